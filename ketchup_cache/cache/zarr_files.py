"""The arrays of one segment as an archive: a Zarr v3 group in an uncompressed zip, made and read in memory.

`zarr.storage.ZipStore` opens it. Format version 1 keeps the same group as files of a folder. The `zarr` library
encodes and decodes. Before it sees any bytes, every document must say what the manifest says, and every chunk must
declare the size that its array gives it: Zarr fills missing chunks with zeros, runs any codec that a file names and
trusts declared sizes.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic_core import from_json

from ketchup_cache.cache.manifest import ArrayEntry
from ketchup_cache.console import one_line
from ketchup_cache.errors import CorruptError
from ketchup_cache.provenance import canonical_json

ARCHIVE = "arrays.zip"
"""The one data file of a segment."""
CHUNK_ELEMENTS = 2**20
"""Most elements in a chunk. Smaller arrays are one chunk."""
MAX_BYTES = 2**30
"""Most bytes in the decoded arrays of a segment, and in its files."""

Bytes = bytes | memoryview
_GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_ZSTD_LEVEL = 1
_CRC_BYTES = 4
_NO_TIME = (1980, 1, 1, 0, 0, 0)
"""Of the files in an archive, so that the same arrays make the same bytes."""


def entry_of(array: NDArray) -> ArrayEntry:
    """What a manifest says about an array."""
    return ArrayEntry(dtype=array.dtype.name, shape=array.shape)


def decoded_bytes(arrays: Mapping[str, ArrayEntry]) -> int:
    return sum(math.prod(entry.shape) * np.dtype(entry.dtype).itemsize for entry in arrays.values())


def member_names(arrays: Mapping[str, ArrayEntry]) -> set[str]:
    """The files of a group with these arrays: neither more nor fewer are allowed."""
    documents = {"zarr.json", *(f"{name}/zarr.json" for name in arrays)}
    return documents.union(*(_chunk_names(name, entry) for name, entry in arrays.items()))


def encode(arrays: Mapping[str, NDArray]) -> dict[str, bytes]:
    """File name → bytes of a Zarr v3 group with these arrays."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    options: dict[str, Any] = {"compressors": [ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()], "fill_value": 0}
    options["config"] = {"write_empty_chunks": True}
    group = zarr.create_group(MemoryStore(files), zarr_format=3)
    for name, array in arrays.items():
        chunks = _chunk_shape(array.shape)
        made = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, **options)
        if array.size:
            made[...] = np.ascontiguousarray(array)
    return {name: data.to_bytes() for name, data in sorted(files.items())}


def pack(files: Mapping[str, bytes]) -> bytes:
    """The archive of a group's files. The same files make the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _NO_TIME), data)
    return packed.getvalue()


def unpack(packed: Bytes) -> dict[str, bytes]:
    """The files in an archive, whose sizes are believed only as far as the archive is long. Raises CorruptError."""
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED and not m.flag_bits & 1 for m in members)
            names = {m.filename for m in members}
            if not stored or len(names) < len(members) or sum(m.file_size for m in members) > len(packed):
                raise CorruptError(f"{ARCHIVE}: is compressed, encrypted, or holds a file twice")
            return {m.filename: archive.read(m) for m in members}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, OverflowError, NotImplementedError) as error:
        raise CorruptError(f"{ARCHIVE}: is not a zip archive ({one_line(error)})") from None


def decode(
    files: Mapping[str, Bytes], expected: Mapping[str, ArrayEntry], in_memory: Mapping[str, DTypeLike] | None = None
) -> dict[str, NDArray]:
    """The arrays of a group, equal in name, dtype and shape to `expected`.

    in_memory: dtype on disk → dtype to return, where they differ.
    Raises CorruptError, naming the file or the array, where anything differs from what `encode` writes.
    """
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    if decoded_bytes(expected) > MAX_BYTES:
        raise CorruptError(f"arrays of {decoded_bytes(expected):,} bytes; the format's limit is {MAX_BYTES:,}")
    if different := member_names(expected) ^ files.keys():
        name = min(different)
        raise CorruptError(f"{name}: {'is not part of the segment' if name in files else 'is missing'}")
    _check_document("zarr.json", files["zarr.json"], _GROUP)
    for name, entry in expected.items():
        _check_document(f"{name}/zarr.json", files[f"{name}/zarr.json"], _metadata(entry))
        size = math.prod(_chunk_shape(entry.shape)) * np.dtype(entry.dtype).itemsize
        for chunk in _chunk_names(name, entry):
            _check_chunk(chunk, memoryview(files[chunk]), size)
    store = MemoryStore({name: cpu.Buffer.from_bytes(bytes(data)) for name, data in files.items()})
    try:
        group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    except TypeError as error:  # Zarr 3.1.0 takes no key that it does not know
        raise CorruptError(f"zarr.json: can't be read ({one_line(error)})") from None
    decoded = {}
    for name, entry in expected.items():
        try:
            array = np.asarray(group[name][...])  # type: ignore[index]
        except (ValueError, RuntimeError, TypeError, KeyError) as error:  # a wrong checksum, a broken zstd block
            raise CorruptError(f"{name}: can't be decoded ({one_line(error)})") from None
        if entry.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
            raise CorruptError(f"{name}: holds bytes that are neither true nor false")
        decoded[name] = array.astype((in_memory or {}).get(entry.dtype, entry.dtype), copy=False)
    return decoded


def _chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole rows, as many as fit into CHUNK_ELEMENTS. An empty axis has chunks of 1, as Zarr wants."""
    row = [max(1, size) for size in shape[1:]]
    return (max(1, min(shape[0], CHUNK_ELEMENTS // math.prod(row))), *row)


def _chunk_names(name: str, entry: ArrayEntry) -> list[str]:
    """None where the array is empty."""
    if not math.prod(entry.shape):
        return []
    rest = "/0" * (len(entry.shape) - 1)
    return [f"{name}/c/{place}{rest}" for place in range(-(-entry.shape[0] // _chunk_shape(entry.shape)[0]))]


def _metadata(entry: ArrayEntry) -> dict[str, Any]:
    """The array's zarr.json. Every value is fixed by the format, so that readers can demand it."""
    endian = {} if np.dtype(entry.dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    zstd = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}
    return _GROUP | {
        "node_type": "array",
        "shape": list(entry.shape),
        "data_type": entry.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunk_shape(entry.shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": np.zeros((), entry.dtype).item(),
        "codecs": [{"name": "bytes", **endian}, zstd, {"name": "crc32c"}],
    }


def _check_document(name: str, data: Bytes, expected: dict[str, Any]) -> None:
    """Keys that the format does not know may be there if they say nothing: another Zarr may write them."""
    try:
        found = from_json(bytes(data))
    except ValueError as error:
        raise CorruptError(f"{name}: not valid JSON ({error})") from None
    known = {key: value for key, value in found.items() if key in expected or value} if isinstance(found, dict) else 0
    wanted = canonical_json(expected)
    if canonical_json(known) != wanted:
        raise CorruptError(f"{name}: not the Zarr metadata this format prescribes: {wanted.decode()}")


def _check_chunk(name: str, data: memoryview, size: int) -> None:
    """A few bytes of zstd can declare gigabytes, which a decoder would allocate."""
    try:
        declared = zstd_content_size(data[:-_CRC_BYTES])
    except (ValueError, IndexError):
        raise CorruptError(f"{name}: not one zstd frame that declares its size") from None
    if declared != size:
        raise CorruptError(f"{name}: declares {declared:,} bytes, its chunk holds {size:,}")


def zstd_content_size(data: Bytes) -> int:
    """Decompressed size of the single zstd frame that `data` is, without decompressing it (RFC 8878, 3.1.1).

    Raises ValueError or IndexError for anything else: a frame without a size, several frames, a cut frame.
    The size is a promise that the decoder enforces: it fails on a frame that holds more.
    """
    if data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("not a zstd frame")
    descriptor = data[4]
    single_segment, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    if width == 0:
        raise ValueError("no declared size")
    size = int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
    # walk over the blocks: a second frame after this one would be decompressed too, whatever size it has
    at, last = start + width, 0
    while not last:
        header = data[at] | data[at + 1] << 8 | data[at + 2] << 16
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else length)  # a block of kind 1 is one byte, repeated
    if at + 4 * has_checksum != len(data):
        raise ValueError("more or less than one frame")
    return size
