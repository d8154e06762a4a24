"""Files and folders that are either whole or not there, and disk errors in one line."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ketchup_cache.errors import WriteError


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


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A folder to fill. It takes the name `target` only when everything in it is on the disk; a folder of that name
    stays until then. Files get the permissions that the umask gives, whatever the library that wrote them says.

    Raises WriteError as `write_file` does; `target` is then as it was.
    """
    partial, old = (target.with_name(f"{target.name}.{end}") for end in ("partial", "old"))
    with writing(target):
        if old.exists() and not target.exists():  # killed between the two renames
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
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
