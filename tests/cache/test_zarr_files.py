"""Arrays as files, below the hashes: any bytes are decoded to the same, or refused; sizes are read, not believed."""

import io
import warnings
import zipfile

import numcodecs
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ketchup_cache.cache import zarr_files as arrays
from ketchup_cache.cache.manifest import ArrayEntry
from ketchup_cache.cache.zarr_files import zstd_content_size
from ketchup_cache.errors import CorruptError
from tests.helpers.errors import refuses
from tests.helpers.segments import same

examples = settings(derandomize=True, deadline=None, max_examples=100)
ZSTD = numcodecs.Zstd(level=1)
SAMPLE = {
    "tokens": np.arange(300, dtype=np.uint16),
    "flags": np.array([True, False, True]),
    "pairs": np.arange(12, dtype=np.uint8).reshape(3, 4),
}
ENTRIES = {name: ArrayEntry(dtype=array.dtype.name, shape=array.shape) for name, array in SAMPLE.items()}
ENCODED = arrays.encode(SAMPLE)
PACKED = arrays.pack(ENCODED)


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    """Up to four bytes in the place of up to three."""
    at = data.draw(st.integers(0, len(whole) - 1))
    return whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 3)) :]


@settings(examples, max_examples=400)
@given(st.data())
def test_unpack_refuses_or_reads_files(data: st.DataObject) -> None:
    """Whatever happens to an archive's bytes: the same arrays, or one error."""
    try:
        decoded = arrays.decode(arrays.unpack(damaged(PACKED, data)), ENTRIES)
    except CorruptError:
        return
    assert all(same(decoded[name], array) for name, array in SAMPLE.items())


def test_archives_that_are_larger_inside_are_refused() -> None:
    def archive(compression: int, names: list[str]) -> bytes:
        made = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(made, "w", compression) as file:
            warnings.simplefilter("ignore")  # of a name that comes twice
            for name in names:
                file.writestr(name, bytes(10**6))
        return made.getvalue()

    for bad in (archive(zipfile.ZIP_DEFLATED, ["zarr.json"]), archive(zipfile.ZIP_STORED, ["a", "a"])):
        refuses(CorruptError, r"arrays\.zip: is compressed, encrypted, or holds a file twice", arrays.unpack, bad)
    refuses(CorruptError, "is not a zip archive", arrays.unpack, b"PK")
    assert arrays.pack(dict(reversed(ENCODED.items()))) == PACKED


@settings(examples, max_examples=400)
@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_decode_refuses_or_reads_the_same(key: str, data: st.DataObject) -> None:
    """Below the hashes: whatever happens to a file's bytes, there is no third way, and no other exception."""
    whole = ENCODED[key]
    changed = damaged(whole, data)
    try:
        decoded = arrays.decode(ENCODED | {key: changed}, ENTRIES)
    except CorruptError as error:
        assert changed != whole
        assert str(error).startswith(key.removesuffix("/zarr.json").split("/c/")[0])  # noqa: PT017
        return
    assert all(same(decoded[name], array) for name, array in SAMPLE.items())


@pytest.mark.parametrize("key", sorted(ENCODED))
def test_decode_wants_exactly_the_files_of_the_arrays(key: str) -> None:
    with pytest.raises(CorruptError, match=f"^{key}: is missing"):
        arrays.decode({k: data for k, data in ENCODED.items() if k != key}, ENTRIES)
    with pytest.raises(CorruptError, match=f"^{key}x: is not part of the segment"):
        arrays.decode(ENCODED | {key + "x": ENCODED[key]}, ENTRIES)


def test_decode_never_allocates_more_than_the_limit() -> None:
    with pytest.raises(CorruptError, match="arrays of 8,000,000,000,000 bytes"):
        arrays.decode(ENCODED, {"tokens": ArrayEntry(dtype="int64", shape=(10**12,))})


@examples
@given(st.binary(max_size=2000), st.integers(1, 5), st.booleans())
def test_zstd_size_is_read_from_the_header(content: bytes, level: int, checksum: bool) -> None:
    frame = bytes(numcodecs.Zstd(level=level, checksum=checksum).encode(content))
    assert zstd_content_size(frame) == len(content)
    for wrong in (frame[:-1], frame + b"\0", frame + frame, b"\0" + frame):
        with pytest.raises((ValueError, IndexError)):
            zstd_content_size(wrong)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 2**20])
def test_zstd_sizes_of_every_width(size: int) -> None:
    assert zstd_content_size(bytes(ZSTD.encode(bytes(size)))) == size
