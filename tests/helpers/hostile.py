"""A forger of segments: contents of any kind, whose hashes are all right. Format versions 1 and 2."""

import functools
import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numcodecs
import numpy as np

from ketchup_cache import open_cache
from ketchup_cache.cache import zarr_files
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.manifest import ArrayEntry
from ketchup_cache.errors import CorruptError, KetchupError
from tests.helpers.errors import refuses
from tests.helpers.segments import load_all

ARCHIVE = zarr_files.ARCHIVE


def refused(root: Path, error: type[KetchupError] = CorruptError, match: str = ": ") -> str:
    """Loading fails with one line and such an error, within a second of computing; `verify` finds it too."""
    began = time.process_time()
    message = refuses(error, match, load_all, root)
    assert time.process_time() - began < 1
    report = verify(open_cache(root))
    assert not report.ok
    assert message in report.problems
    return message


Change = Callable[[dict, dict[str, bytes]], object]


def forge(cache: Cache, segment_id: str, change: Change, keep: bool = False, version: int = 2) -> str:
    """A segment changed by someone who knows the format: every length and hash fits again.

    change: gets the manifest and the members of the group; names in manifest["files"] are those of version 1.
    """
    folder, path = cache.path / "segments" / segment_id, cache.path / "manifests" / f"{segment_id}.json"
    manifest = json.loads(path.read_bytes())
    old = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files = dict(zarr_files.unpack(old[ARCHIVE]) if manifest["version"] == 2 else old)
    manifest["files"], manifest["version"] = {name: entry(data) for name, data in files.items()}, version
    before = dict(files)
    change(manifest, files)
    for name in before.keys() | files.keys():
        if name not in files:
            manifest["files"].pop(name, None)
        elif files[name] != before.get(name):
            manifest["files"][name] = entry(files[name])
    if version == 2:
        packed = zarr_files.pack(files)
        says = [e for name, e in manifest["files"].items() if name not in files or e != entry(files[name])]
        files, manifest["files"] = {ARCHIVE: packed}, {ARCHIVE: entry(packed) | (says[0] if says else {})}
    else:
        manifest["info"].pop("finished", None)
    data = json.dumps(manifest).encode()
    forged = hashlib.sha256(data).hexdigest()
    if not keep:
        removed(cache.path, segment_id)
    for name, content in files.items():
        target = cache.path / "segments" / forged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (cache.path / "manifests" / f"{forged}.json").write_bytes(data)
    cache.refresh()
    return forged


def entry(data: bytes) -> dict:
    return {"length": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def stored(array: np.ndarray, name: str) -> dict[str, bytes]:
    """The files of one array."""
    return {key: data for key, data in zarr_files.encode({name: array}).items() if key.startswith(name)}


def replaced(name: str, array: np.ndarray) -> Change:
    return lambda manifest, files: files.update(stored(array, name))


def altered(name: str, place: object, value: object) -> Change:
    """An array with another value in one place. value: or what gives it, from the array."""

    def change(manifest: dict, files: dict[str, bytes]) -> None:
        entries = {key: ArrayEntry(**entry) for key, entry in manifest["arrays"].items()}
        array = np.array(zarr_files.decode(files, entries)[name])
        array[place] = value(array) if callable(value) else value
        files.update(stored(array, name))

    return change


def edited(key: str, **values: object) -> Change:
    """zarr.json of an array, with other values."""
    return lambda manifest, files: files.update({key: json.dumps(json.loads(files[key]) | values).encode()})


def removed(root: Path, segment_id: str) -> None:
    shutil.rmtree(root / "segments" / segment_id)
    (root / "manifests" / f"{segment_id}.json").unlink()


def renamed(old: str, new: str) -> Change:
    return lambda manifest, files: files.update({new: files.pop(old)})


def chunk(data: bytes) -> bytes:
    """With its CRC-32C (RFC 3720), as the third codec appends it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return data + (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def said(*keys: str, **values: object) -> Change:
    """The manifest, with other values in its mapping under these keys."""
    return lambda manifest, files: functools.reduce(dict.__getitem__, keys, manifest).update(values)


def holding(data: bytes, key: str = "tokens/c/0") -> Change:
    return lambda manifest, files: files.update({key: data})


def both(*changes: Change) -> Change:
    return lambda manifest, files: [change(manifest, files) for change in changes]


def of_size(size: int) -> Change:
    return both(said(tokens=size), said("arrays", "tokens", shape=[size]))


def frame(size: int) -> bytes:
    return bytes(ZSTD.encode(bytes(size)))


def _deep(levels: int) -> object:
    return {"a": _deep(levels - 1)} if levels else 0


def understated(frame: bytes, size: int) -> bytes:
    assert frame[4] == 0x20  # one segment, a size of one byte
    return frame[:5] + bytes([size]) + frame[6:]


ZSTD = numcodecs.Zstd(level=1)
PICKLED = [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {"id": "pickle"}}]
UNPICKLED = both(edited("tokens/zarr.json", codecs=PICKLED), holding(pickle.dumps(Payload())))
OUTSIDE, NOT_ZARR = "is foreign|is missing|is not part", "not the Zarr metadata"
NOT_A_FRAME, UNORDERED, CREDENTIALS = "not one zstd frame", "offsets of tokens do not rise", "address with credentials"
HOSTILE = {
    "a path out of the segment": (renamed("tokens/c/0", "../../tokens"), OUTSIDE),
    "an absolute path": (renamed("tokens/c/0", "/etc/passwd"), OUTSIDE),
    "a foreign file": (holding(b"print()", "run.py"), "is foreign|is not part"),
    "a missing chunk": (lambda m, f: f.pop("tokens/c/0"), "is missing"),
    "a foreign array": (said("arrays", x={"dtype": "uint8", "shape": [1]}), "array 'x'"),
    "a missing array": (lambda m, f: m["arrays"].pop("ids"), "array 'ids'"),
    "another dtype": (said("arrays", "tokens", dtype="uint32"), "array 'tokens'"),
    "an unknown dtype": (said("arrays", "tokens", dtype="object"), "arrays.tokens.dtype"),
    "a huge shape": (of_size(10**12), "limit is"),
    "an endless shape": (of_size(10**400), "limit is"),
    "a negative shape": (said("arrays", "tokens", shape=[-1]), "arrays.tokens.shape"),
    "a huge file": (said("files", "tokens/c/0", length=2**40, sha256="0" * 64), "limit is"),
    "no version": (lambda m, f: m.pop("version"), "format and version"),
    "an unknown key": (said(extra=1), "extra"),
    "metadata of another shape": (edited("tokens/zarr.json", shape=[7]), NOT_ZARR),
    "metadata of a huge shape": (edited("tokens/zarr.json", shape=[10**12]), NOT_ZARR),
    "metadata of Zarr 2": (edited("tokens/zarr.json", zarr_format=2), NOT_ZARR),
    "metadata with a filter that unpickles": (edited("tokens/zarr.json", filters=[{"id": "pickle"}]), NOT_ZARR),
    "a codec that unpickles": (UNPICKLED, NOT_ZARR),
    "an unknown codec": (edited("tokens/zarr.json", codecs=[{"name": "nothing"}]), NOT_ZARR),
    "consolidated metadata": (edited("zarr.json", consolidated_metadata={"metadata": {}}), NOT_ZARR),
    "deep JSON": (holding(b"[" * 100_000, "tokens/zarr.json"), "not valid JSON"),
    "a chunk that is not zstd": (holding(b"x" * 40), NOT_A_FRAME),
    "an empty chunk": (holding(b""), NOT_A_FRAME),
    "a zstd bomb": (holding(chunk(frame(2**28))), "declares 268,435,456 bytes, its chunk holds 16"),
    "a zstd bomb behind a harmless frame": (holding(chunk(frame(16) + frame(2**28))), NOT_A_FRAME),
    "a zstd frame that understates its size": (holding(chunk(understated(frame(200), 16))), "can't be decoded"),
    "a wrong checksum": (lambda m, f: f.update({"tokens/c/0": f["tokens/c/0"][:-1] + b"\0"}), "can't be decoded"),
    "ids beyond the vocabulary": (replaced("tokens", np.full(8, 60, np.uint16)), r"tokens\[0\] is not a token id"),
    "offsets out of order": (replaced("offsets", np.array([0, 5, 4, 8])), UNORDERED),
    "offsets past the end": (replaced("offsets", np.array([0, 3, 4, 9])), UNORDERED),
    "offsets that start late": (replaced("offsets", np.array([1, 3, 4, 8])), UNORDERED),
    "negative offsets": (replaced("offsets", np.array([0, -3, 4, 8])), UNORDERED),
    "a fingerprint that is none": (said("info", "tokenizer", fingerprint="../../etc"), "tokenizer.fingerprint"),
    **{f"an author {author!r:.5}": (said(author=author), "author") for author in (None, "", 7, "x" * 201)},
    "a hash in capitals": (said("files", "zarr.json", sha256="A" * 64), "sha256"),
    "a name with credentials": (said("info", "data", name="https://me:SECRET@example.org/data"), CREDENTIALS),
    "a name with a token": (said("info", "tokenizer", name="s3://SECRET@bucket/tokenizer"), CREDENTIALS),
    "a text for a number": (said(rows="3"), "rows"),
    "a vocabulary of nothing": (said("info", "tokenizer", vocab_size=0), "vocab_size"),
    "an unknown kind": (said("info", kind="weights"), "kind"),
    "a deep manifest": (said(tool=_deep(200)), "recursion limit"),
    "offsets that overflow": (replaced("offsets", np.array([0, 2**63 - 1, -(2**63), 8])), "offsets of tokens"),
}
