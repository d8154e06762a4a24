"""The arrays of one segment ↔ the bytes of its files: a plain Zarr v3 group, made and read in memory.

Any Zarr reads these files (a test has it do so, and compares the bytes with what it writes). We read them ourselves,
chunk by chunk in threads, because Zarr follows links, fills missing chunks with zeros, runs any codec a file names,
trusts declared sizes, and copies every byte several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Zstd
from numpy.typing import DTypeLike, NDArray
from pydantic_core import from_json

from ketchup_cache.cache.manifest import ArrayEntry
from ketchup_cache.cache.threads import each, one_by_one
from ketchup_cache.errors import CorruptError
from ketchup_cache.provenance import canonical_json

CHUNK_ELEMENTS = 2**20
"""Most elements in a chunk. Smaller arrays are one chunk."""
MAX_BYTES = 2**30
"""Most bytes in the decoded arrays of a segment, and in its files."""

_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_AS_STORED: Mapping[str, DTypeLike] = {}
_ZSTD_LEVEL = 1
_CRC_BYTES = 4
_CRC_RESIDUE = 0x48674BC7
"""CRC-32C of anything that ends in its own CRC-32C."""


def entry_of(array: NDArray) -> ArrayEntry:
    """What a manifest says about an array."""
    return ArrayEntry(dtype=array.dtype.name, shape=array.shape)


def decoded_bytes(arrays: Mapping[str, ArrayEntry]) -> int:
    return sum(math.prod(entry.shape) * np.dtype(entry.dtype).itemsize for entry in arrays.values())


def file_names(arrays: Mapping[str, ArrayEntry]) -> set[str]:
    """The files a group of such arrays is made of: neither more nor fewer are allowed."""
    return {"zarr.json"}.union(*(_array_files(name, entry) for name, entry in arrays.items()))


def encoders(arrays: Mapping[str, NDArray]) -> dict[str, Callable[[], tuple[bytes, ...]]]:
    """File name → function that makes the file's bytes, in pieces, for a Zarr v3 group with these arrays.

    The functions can run in any order and in threads: compression does not hold the interpreter's lock.
    """
    documents = {"zarr.json": _GROUP} | {f"{name}/zarr.json": _metadata(entry_of(a)) for name, a in arrays.items()}
    made: dict[str, Callable[[], tuple[bytes, ...]]] = {}
    for key, document in documents.items():
        made[key] = partial(tuple, [canonical_json(document)])
    for name, array in arrays.items():
        entry = entry_of(array)
        little = np.ascontiguousarray(array, _on_disk(entry))
        for key, rows in _chunks(name, entry):
            made[key] = partial(_encode_chunk, little, rows)
    return made


def encode(arrays: Mapping[str, NDArray]) -> dict[str, bytes]:
    """File name → bytes of a Zarr v3 group with these arrays."""
    return {key: b"".join(make()) for key, make in sorted(encoders(arrays).items())}


def decode(
    files: Mapping[str, bytes | memoryview],
    expected: Mapping[str, ArrayEntry],
    in_memory: Mapping[str, DTypeLike] = _AS_STORED,
) -> dict[str, NDArray]:
    """The arrays of a group, equal in name, dtype and shape to `expected`.

    `files` must be exactly `file_names(expected)`; each is asked for once, maybe in a thread. Arrays whose dtype is in
    `in_memory` are converted to the dtype there. Raises CorruptError, naming the file, where anything differs from
    what `encode` writes.
    """
    if decoded_bytes(expected) > MAX_BYTES:
        raise CorruptError(
            f"zarr.json: arrays of {decoded_bytes(expected):,} bytes; the format's limit is {MAX_BYTES:,}"
        )
    if different := file_names(expected) ^ files.keys():
        key = min(different)
        raise CorruptError(f"{key}: {'is not part of the segment' if key in files else 'is missing'}")
    _check_document("zarr.json", files["zarr.json"], _GROUP)
    for name, entry in expected.items():
        _check_document(f"{name}/zarr.json", files[f"{name}/zarr.json"], _metadata(entry))
    decoded = _allocated(expected, in_memory)
    tasks = [(key, name, rows) for name, entry in expected.items() for key, rows in _chunks(name, entry)]
    tasks.sort(key=lambda task: decoded[task[1]].nbytes, reverse=True)  # so that threads end together
    # threads are worth it for a megabyte and more
    (each if decoded_bytes(expected) > CHUNK_ELEMENTS else one_by_one)(
        lambda task: _decode_chunk(task[0], files[task[0]], _on_disk(expected[task[1]]), decoded[task[1]], task[2]),
        tasks,
    )
    return decoded


def _allocated(expected: Mapping[str, ArrayEntry], in_memory: Mapping[str, DTypeLike]) -> dict[str, NDArray]:
    """Empty arrays. What is stored as float32, nearly all of the bytes, lies in one piece: from 4 MiB on, NumPy asks
    for large pages, and to touch 16 MB of small ones for the first time can take as long as to decompress them."""
    sizes = {name: math.prod(entry.shape) for name, entry in expected.items() if entry.dtype == "float32"}
    room = np.empty(sum(sizes.values()), np.float32)
    made: dict[str, NDArray] = {}
    for name, entry in expected.items():
        if name in sizes:
            made[name], room = room[: sizes[name]].reshape(entry.shape), room[sizes[name] :]
        else:
            made[name] = np.empty(entry.shape, in_memory.get(entry.dtype, entry.dtype))
    return made


def _encode_chunk(array: NDArray, rows: int) -> tuple[bytes, bytes]:
    """The chunk that begins at a row: zstd, then CRC-32C. Chunks at the end are filled up with zeros."""
    chunk_rows = _chunk_shape(array.shape)[0]
    chunk = array[rows : rows + chunk_rows]
    if len(chunk) < chunk_rows:
        chunk = np.concatenate([chunk, np.zeros((chunk_rows - len(chunk), *array.shape[1:]), array.dtype)])
    data = bytes(Zstd(level=_ZSTD_LEVEL).encode(chunk))
    return data, google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")


def _decode_chunk(key: str, data: bytes | memoryview, stored: np.dtype, out: NDArray, rows: int) -> None:
    """Decode the chunk that begins at a row, of elements of dtype `stored`, into its place in the array."""
    chunk_rows, *row_shape = _chunk_shape(out.shape)
    frame = memoryview(data)[:-_CRC_BYTES]
    _check_chunk(key, frame, math.prod((chunk_rows, *row_shape)) * stored.itemsize)
    if google_crc32c.value(np.frombuffer(data, np.uint8)) != _CRC_RESIDUE:  # it takes no memoryview
        raise CorruptError(f"{key}: can't be decoded (its checksum differs)")
    part = out[rows : rows + chunk_rows]
    straight = len(part) == chunk_rows and out.dtype == stored and out.size
    whole = part if straight else np.empty((chunk_rows, *row_shape), stored)
    try:
        Zstd(level=_ZSTD_LEVEL).decode(frame, whole.view(np.uint8))
    except (ValueError, RuntimeError) as error:  # a broken zstd block
        raise CorruptError(f"{key}: can't be decoded ({' '.join(str(error).split())})") from None
    if whole.dtype == bool and whole.view(np.uint8).max(initial=0) > 1:
        raise CorruptError(f"{key}: holds bytes that are neither true nor false")
    if whole is not part:
        part[...] = whole[: len(part)]


def _on_disk(entry: ArrayEntry) -> np.dtype:
    return np.dtype(entry.dtype).newbyteorder("<")


def _chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole rows, as many as fit into CHUNK_ELEMENTS. An empty axis has chunks of 1, as Zarr wants."""
    row = [max(1, size) for size in shape[1:]]
    return (max(1, min(shape[0], CHUNK_ELEMENTS // math.prod(row))), *row)


def _chunks(name: str, entry: ArrayEntry) -> list[tuple[str, int]]:
    """(file name, first row) of every chunk: none where the array is empty."""
    if not math.prod(entry.shape):
        return []
    rows = _chunk_shape(entry.shape)[0]
    rest = "/0" * (len(entry.shape) - 1)
    return [(f"{name}/c/{place}{rest}", place * rows) for place in range(-(-entry.shape[0] // rows))]


def _array_files(name: str, entry: ArrayEntry) -> list[str]:
    return [f"{name}/zarr.json", *(key for key, _ in _chunks(name, entry))]


def _metadata(entry: ArrayEntry) -> dict[str, Any]:
    """The array's zarr.json. Every value is fixed by the format, so that readers can demand it."""
    one_byte = np.dtype(entry.dtype).itemsize == 1
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(entry.shape),
        "data_type": entry.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunk_shape(entry.shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": np.zeros((), entry.dtype).item(),
        "codecs": [
            {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}},
            {"name": "crc32c"},
        ],
        "attributes": {},
    }


def _check_document(key: str, data: bytes | memoryview, expected: dict[str, Any]) -> None:
    wanted = canonical_json(expected)
    try:
        if canonical_json(from_json(bytes(data))) == wanted:
            return
    except ValueError as error:
        raise CorruptError(f"{key}: not valid JSON ({error})") from None
    raise CorruptError(f"{key}: not the Zarr metadata this format prescribes: {wanted.decode()}")


def _check_chunk(key: str, frame: memoryview, size: int) -> None:
    try:
        declared = zstd_content_size(frame)
    except (ValueError, IndexError):
        raise CorruptError(f"{key}: not one zstd frame that declares its size") from None
    if declared != size:
        raise CorruptError(f"{key}: declares {declared:,} bytes, its chunk holds {size:,}")


def zstd_content_size(data: bytes | memoryview) -> int:
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
