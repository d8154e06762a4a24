"""The arrays of one segment ↔ the bytes of its files: a plain Zarr v3 group, made and read in memory.

Zarr never touches the disk, and before it sees a byte, every file is known to be exactly what the format prescribes:
Zarr by itself follows links, fills missing chunks with zeros, runs any codec a file names and trusts declared sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic_core import from_json
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from ketchup_cache.errors import CorruptError
from ketchup_cache.store.manifest import ArrayEntry, canonical_json

CHUNK_ELEMENTS = 2**20
"""Most elements in a chunk. Smaller arrays are one chunk."""
MAX_BYTES = 2**30
"""Most bytes in the decoded arrays of a segment, and in its files."""

_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_WRITE_EVERY_CHUNK = {"array.write_empty_chunks": True}
_CRC_BYTES = 4


def entry_of(array: NDArray) -> ArrayEntry:
    """What a manifest says about an array."""
    return ArrayEntry(dtype=array.dtype.name, shape=array.shape)


def decoded_bytes(arrays: Mapping[str, ArrayEntry]) -> int:
    return sum(math.prod(entry.shape) * np.dtype(entry.dtype).itemsize for entry in arrays.values())


def file_names(arrays: Mapping[str, ArrayEntry]) -> set[str]:
    """The files a group of such arrays is made of: neither more nor fewer are allowed."""
    return {"zarr.json"}.union(*(_array_files(name, entry) for name, entry in arrays.items()))


def encode(arrays: Mapping[str, NDArray]) -> dict[str, bytes]:
    """File name → bytes of a Zarr v3 group with these arrays."""
    entries = {name: entry_of(array) for name, array in arrays.items()}
    documents = {"zarr.json": _GROUP} | {f"{name}/zarr.json": _metadata(entry) for name, entry in entries.items()}
    buffer = default_buffer_prototype().buffer
    store = {key: buffer.from_bytes(canonical_json(document)) for key, document in documents.items()}
    with zarr.config.set(_WRITE_EVERY_CHUNK):
        for name, array in arrays.items():
            zarr.open_array(MemoryStore(store), path=name, mode="r+", zarr_format=3)[...] = array
    return {key: store[key].to_bytes() for key in sorted(file_names(entries))}


def decode(files: Mapping[str, bytes], expected: Mapping[str, ArrayEntry]) -> dict[str, NDArray]:
    """The arrays of a group, equal in name, dtype and shape to `expected`.

    `files` must be exactly `file_names(expected)`. Raises CorruptError, naming the file, where anything differs from
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
        chunk_bytes = math.prod(_chunk_shape(entry.shape)) * np.dtype(entry.dtype).itemsize
        for key in _chunk_files(name, entry):
            _check_chunk(key, files[key], chunk_bytes)
    buffer = default_buffer_prototype().buffer
    store = MemoryStore({key: buffer.from_bytes(data) for key, data in files.items()}, read_only=True)
    return {name: _read_array(store, name, entry) for name, entry in expected.items()}


def _read_array(store: MemoryStore, name: str, entry: ArrayEntry) -> NDArray:
    try:
        array = np.asarray(zarr.open_array(store, path=name, mode="r", zarr_format=3)[...])
    except (ValueError, RuntimeError) as error:  # a checksum that differs, a broken zstd block
        raise CorruptError(f"{name}/c: can't be decoded ({' '.join(str(error).split())})") from None
    if entry.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
        raise CorruptError(f"{name}/c: holds bytes that are neither true nor false")
    return array


def _chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Whole rows, as many as fit into CHUNK_ELEMENTS. An empty axis has chunks of 1, as Zarr wants."""
    row = [max(1, size) for size in shape[1:]]
    return (max(1, min(shape[0], CHUNK_ELEMENTS // math.prod(row))), *row)


def _chunk_files(name: str, entry: ArrayEntry) -> list[str]:
    axes = [range(-(-size // chunk)) for size, chunk in zip(entry.shape, _chunk_shape(entry.shape), strict=True)]
    return ["/".join((name, "c", *map(str, place))) for place in itertools.product(*axes)]


def _array_files(name: str, entry: ArrayEntry) -> list[str]:
    return [f"{name}/zarr.json", *_chunk_files(name, entry)]


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
            {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            {"name": "crc32c"},
        ],
        "attributes": {},
    }


def _check_document(key: str, data: bytes, expected: dict[str, Any]) -> None:
    wanted = canonical_json(expected)
    try:
        if canonical_json(from_json(data)) == wanted:
            return
    except ValueError as error:
        raise CorruptError(f"{key}: not valid JSON ({error})") from None
    raise CorruptError(f"{key}: not the Zarr metadata this format prescribes: {wanted.decode()}")


def _check_chunk(key: str, data: bytes, size: int) -> None:
    try:
        declared = zstd_content_size(data[:-_CRC_BYTES])
    except (ValueError, IndexError):
        raise CorruptError(f"{key}: not one zstd frame that declares its size") from None
    if declared != size:
        raise CorruptError(f"{key}: declares {declared:,} bytes, its chunk holds {size:,}")


def zstd_content_size(data: bytes) -> int:
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
