"""Files and folders that are either whole or not there, and disk errors in one line."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ketchup_cache.errors import ConfigError, WriteError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"{path}: can't be written ({reason}): free space or choose another place") from error


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, making its folder; a file that was there stays until the new one is complete.

    Raises WriteError where the disk is full, read-only or failing, or `path` is a folder.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(temporary, content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def read_small(path: Path, limit: int) -> bytes:
    """A file of at most so many bytes. Raises OSError for a longer one, and for a pipe, which would be waited for."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        if len(content := file.read(limit + 1)) > limit:
            raise OSError(f"it has more than {limit:,} bytes")
        return content


@contextmanager
def holding(folder: Path, target: Path | None = None) -> Iterator[None]:
    """Make a folder, for `target` if not for itself, and hold it: a second process that wants it gets a ConfigError."""
    what = target or folder
    with writing(what):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError([f"{what}: another process writes there; wait for it, or choose another place"]) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(lock)


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A folder to fill, held meanwhile (`holding`). It takes the name `target` only when everything in it is on the
    disk; a folder of that name stays until then. Files get the permissions that the umask gives, whatever the library
    that wrote them says.

    Raises WriteError as `write_file` does; `target` is then as it was.
    """
    partial, old = (target.with_name(f"{target.name}.{end}") for end in ("partial", "old"))
    with holding(partial, target), writing(target):
        if old.exists() and not target.exists():  # killed between the two renames
            old.rename(target)
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        mode = partial.stat().st_mode & 0o666
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(mode)
            sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet and wait until its bytes are on the disk; its name may not be (`sync`)."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def sync(path: Path) -> None:
    """Wait for the disk to have a file's content, or a folder's names: on POSIX, syncing a file leaves out its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
