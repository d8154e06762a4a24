"""Files that survive crashes: a segment is either wholly there or not there at all.

A segment is written under tmp/ and made durable first. Then its data moves to segments/, and last its manifest to
manifests/: that one rename is the commit. Nothing is ever changed afterwards, so there are no locks.
Every step on the file system is here, so that the tests can fail and kill at each one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from ketchup_cache.cache.threads import PROCESSORS, THREADS, each
from ketchup_cache.errors import CacheError, CorruptError, WriteError

MARKER = "ketchup-cache.json"
FOLDERS = ("manifests", "segments", "tmp")
PIECE = 2**18
"""Bytes that are read and hashed at a time."""
Bytes = bytes | memoryview
Pieces = tuple[Bytes, ...]
"""The bytes of a file, which need not be copied to be joined."""


class Stage:
    """A segment on its way into a cache: its files are written first, and only then is its id known."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder = root, folder

    def write(self, files: Mapping[str, Callable[[], Pieces]]) -> dict[str, tuple[int, str]]:
        """Make, hash, write and sync every file. Returns the length and SHA-256 of each. Raises OSError.

        The disk is busy with some files while others are made: it is what takes longest.
        """
        data = self._folder / "data"
        folders = {data}
        for name in files:
            path = data / name
            folders.update(parent for parent in path.parents if parent.is_relative_to(data))
            os.makedirs(path.parent, exist_ok=True)

        def write_one(name: str) -> tuple[int, str, Future[None]]:
            pieces = files[name]()
            synced = syncing.submit(_sync_and_close, _write(data / name, pieces))
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            return sum(map(len, pieces)), digest.hexdigest(), synced

        with ThreadPoolExecutor(THREADS) as syncing:
            # no more at a time than there are processors, so that the disk gets the first of them early
            written = dict(zip(files, each(write_one, list(files), PROCESSORS), strict=True))
            for _, _, synced in written.values():
                synced.result()
        each(_sync_folder, sorted(folders))
        return {name: (length, digest) for name, (length, digest, _) in written.items()}

    def commit(self, segment_id: str, manifest: bytes) -> None:
        """Make what was written a segment of the cache. When this returns, it survives a power cut. Raises OSError."""
        data, target = self._folder / "data", self._root / "segments" / segment_id
        _write_file(self._folder / "manifest.json", manifest)
        _sync_folder(self._folder)
        # all space is taken by now: what is left are renames
        if target.exists() and not _holds(target, data):  # left by a crash between the renames, then damaged
            os.rename(target, self._folder / "damaged")
        if not target.exists():
            try:
                os.rename(data, target)
            except OSError:  # another process was faster with the same segment, copied at the same time
                if not (target.exists() and _holds(target, data)):
                    raise
        _sync_folder(target.parent)
        os.rename(self._folder / "manifest.json", self._root / "manifests" / f"{segment_id}.json")
        _sync_folder(self._root / "manifests")


@contextmanager
def staged(root: Path) -> Iterator[Stage]:
    """A place to write one segment; what is not committed at the end is gone.

    Raises WriteError where the disk is full, read-only or failing. Safe in any number of processes at once.
    """
    with _staging(root) as folder:
        yield Stage(root, folder)


def publish(root: Path, segment_id: str, files: Mapping[str, Bytes], manifest: bytes) -> None:
    """Commit one segment. When this returns, it survives a power cut; before, readers see nothing of it.

    Raises WriteError where the disk is full, read-only or failing. Safe in any number of processes at once.
    """
    with staged(root) as stage:
        stage.write({name: partial(tuple, [content]) for name, content in files.items()})
        stage.commit(segment_id, manifest)


def create(root: Path, marker: bytes) -> None:
    """Make an empty cache. The marker comes last, so that a cache that has one is whole. Raises WriteError."""
    with _staging(root) as stage:
        _write_file(stage / MARKER, marker)
        os.rename(stage / MARKER, root / MARKER)
        _sync_folder(root)


def read_file(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises CorruptError where it is missing, longer, a link or not a file; CacheError where it can't be read.
    """
    with _opened(path, limit) as (reader, _):
        return reader.read(limit + 1)


def read_hashed(path: Path, limit: int) -> tuple[Bytes, str]:
    """As `read_file`; with the SHA-256 of the bytes, worked out on each piece while it is in the processor's cache."""
    digest = hashlib.sha256()
    with _opened(path, limit) as (reader, size):
        data, done = np.empty(size, np.uint8).data, 0
        while read := reader.readinto(data[done : done + PIECE]):
            digest.update(data[done : done + read])
            done += read
    return data[:done].toreadonly(), digest.hexdigest()


@contextmanager
def _opened(path: Path, limit: int) -> Iterator[tuple[io.FileIO, int]]:
    """A file to read, and its length."""
    try:
        # a named pipe would block at open, a link could lead anywhere
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb", buffering=0) as reader:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptError(f"{path}: is not a regular file")
            if status.st_size > limit:
                raise CorruptError(f"{path}: is {status.st_size:,} bytes long, expected {limit:,} at most")
            yield reader, status.st_size
    except FileNotFoundError:
        raise CorruptError(f"{path}: is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptError(f"{path}: is a symbolic link; the format wants plain files") from None
        raise CacheError(f"{path}: can't be read ({error.strerror}); check the disk and your permissions") from None


def list_folder(path: Path) -> list[str]:
    """Names in a folder; none where it is missing, as copying tools may drop empty folders. Raises CacheError."""
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{path}: can't be read ({error.strerror}); check the path and your permissions") from None


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A new folder under tmp/, gone afterwards. Turns OSError into WriteError."""
    stage = root / "tmp" / uuid.uuid4().hex
    try:
        for folder in FOLDERS:
            _make_folders(root / folder)
        os.mkdir(stage)
        yield stage
    except OSError as error:
        raise WriteError(
            f"{root}: can't write ({error.strerror or error}): {_advice(error)}; what was committed before is kept"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "choose a cache folder you may write to"
    return "check the disk and run the command again"


def _make_folders(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    if not path.is_dir():
        _make_folders(path.parent)
        with suppress(FileExistsError):  # another process was faster; a file there fails at its first use as a folder
            os.mkdir(path)
        _sync_folder(path.parent)


def _write_file(path: Path, data: bytes) -> None:
    _sync_and_close(_write(path, (data,)))


def _write(path: Path, pieces: Pieces) -> int:
    """Write a new file; returns it open, because not yet synced."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(file, rest) :]
    except BaseException:
        os.close(file)
        raise
    return file


def _sync_and_close(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable: on POSIX, syncing a file does not sync its name."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _holds(folder: Path, other: Path) -> bool:
    """Whether a folder has all files of another one, with the same bytes."""
    try:
        for at, _, names in os.walk(other):
            for path in (Path(at) / name for name in names):
                content = path.read_bytes()
                if read_file(folder / path.relative_to(other), len(content)) != content:
                    return False
    except CacheError:
        return False
    return True
