"""A cache in a folder: files that survive crashes. A segment is either wholly there or not there at all.

A segment is written under tmp/ and made durable first. Then its data moves to segments/, and last its manifest to
manifests/: that one rename is the commit. Nothing is ever changed afterwards, so there are no locks.
Every step on the file system is here or in files.py, so that the tests can fail and kill at each one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ketchup_cache.cache import zarr_files
from ketchup_cache.cache.segment_bytes import MARKER, MARKER_BYTES, MAX_MANIFEST_BYTES, KeyedStore, Packed, ids_among
from ketchup_cache.errors import CacheError, CorruptError, WriteError
from ketchup_cache.files import sync, write_new

FOLDERS = ("manifests", "segments", "tmp")
WHOLE = (zarr_files.ARCHIVE, "zarr.json")
"""Of a segment's data, in versions 2 and 1."""
ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the command again")
ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a cache folder you may write to")


class FolderStore(KeyedStore):
    """A cache in a folder, on this machine or a shared file system (`SegmentStore`)."""

    batch_bytes = 0

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def create(self) -> None:
        """Raises CacheError where the folder holds something else. An interrupted creation, or one that another
        process is making right now, leaves folders of ours."""
        if self.exists():
            return
        foreign = [name for name in list_folder(self.path) if name not in (*FOLDERS, MARKER) and name[0] != "."]
        if foreign:
            raise self.no_cache()
        create(self.path, MARKER_BYTES)
        self.exists()

    def no_cache(self) -> CacheError:
        """What to raise where `exists` says no."""
        if not self.path.exists():
            return CacheError(f"{self.path}: no cache here; `ketchup-cache rollout --cache {self.path}` makes one")
        list_folder(self.path)  # says what is wrong with a folder that can't be read
        todo = "`ketchup-cache rollout --cache FOLDER` makes one in a new or empty folder"
        return CacheError(f"{self.path}: is not a ketchup cache (it has no {MARKER}); {todo}")

    def segment_ids(self) -> list[str]:
        return ids_among(list_folder(self.path / "manifests"))

    def _get(self, key: str, limit: int) -> bytes:
        path = self.path / key
        for folder in path.parents[: key.count("/")]:  # those below the cache's own
            if folder.is_symlink():
                raise _linked(folder)
        return read_file(path, limit)

    def put(self, batch: Sequence[Packed]) -> None:
        for packed in batch:
            publish(self.path, packed)


def publish(root: Path, packed: Packed) -> None:
    """Commit one segment. When this returns, it survives a power cut; before, readers see nothing of it.

    Raises WriteError where the disk is full, read-only or failing. Safe in any number of processes at once.
    """
    with _staging(root) as stage:
        data, target = stage / "data", root / "segments" / packed.segment_id
        for name, content in packed.files.items():
            path = data / name
            os.makedirs(path.parent, exist_ok=True)
            write_new(path, content)
        write_new(stage / "manifest.json", packed.manifest)
        for folder in (stage, *(path for path in stage.rglob("*") if path.is_dir())):
            sync(folder)
        # all space is taken by now: what is left are renames
        if target.exists() and not _holds(target, packed):  # left by a crash between the renames, then damaged
            os.rename(target, stage / "damaged")
        if not target.exists():
            try:
                os.rename(data, target)
            except OSError:  # another process was faster with the same segment, copied at the same time
                if not (target.exists() and _holds(target, packed)):
                    raise
        sync(target.parent)
        os.rename(stage / "manifest.json", root / "manifests" / f"{packed.segment_id}.json")
        sync(root / "manifests")


def create(root: Path, marker: bytes) -> None:
    """Make an empty cache. The marker comes last, so that a cache that has one is whole. Raises WriteError."""
    with _staging(root) as stage:
        write_new(stage / MARKER, marker)
        os.rename(stage / MARKER, root / MARKER)
        sync(root)


def read_file(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises FileNotFoundError where it is missing, CorruptError where it is longer, a link or not a file, CacheError
    where it can't be read.
    """
    try:
        # a named pipe would block at open, a link could lead anywhere
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb", buffering=0) as reader:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptError(f"{path}: is not a regular file")
            if status.st_size > limit:
                raise CorruptError(f"{path}: is {status.st_size:,} bytes long, expected {limit:,} at most")
            return reader.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _linked(path) from None
        raise CacheError(f"{path}: can't be read ({error.strerror}); check the disk and your permissions") from None


def list_folder(path: Path) -> list[str]:
    """Names in a folder; none where it is missing, as copying tools may drop empty folders.

    Raises CorruptError for a link, which could lead to another's files, CacheError where it can't be read.
    """
    try:
        if path.name in FOLDERS and path.is_symlink():
            raise _linked(path)
        return os.listdir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{path}: can't be read ({error.strerror}); check the path and your permissions") from None


def orphans(root: Path, keep: set[str]) -> tuple[list[Path], list[Path]]:
    """What no reader looks at: data in segments/ without a manifest that nobody in `keep` names, and entries of tmp/.
    Apart from it, whole data whose manifest was there and is lost: a commit that was killed has left it in tmp/.

    Data is listed before tmp/ and manifests, so that a segment that is committed in between is neither.
    """
    data = sorted(list_folder(root / "segments"))
    tmp, begun = [root / "tmp" / name for name in sorted(list_folder(root / "tmp"))], set()
    tmp += sorted(root.glob(f".{FolderStore.INDEX}.*"))
    for stage in tmp:
        with suppress(FileNotFoundError, CacheError):
            begun.add(hashlib.sha256(read_file(stage / "manifest.json", MAX_MANIFEST_BYTES)).hexdigest())
    known = set(ids_among(list_folder(root / "manifests")))
    bare = [root / "segments" / name for name in data if name not in known]
    lost = {path: None for path in bare if path.name not in begun and any((path / name).exists() for name in WHOLE)}
    return [*(path for path in bare if path not in lost and path.name not in keep), *tmp], list(lost)


def weigh(path: Path) -> tuple[float, int]:
    """Time of the newest change in a file or folder (names, contents, renames), and its bytes. Links count as such."""
    newest, size = 0.0, 0
    for inner in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with suppress(FileNotFoundError):
            status = os.lstat(inner)
            newest = max(newest, status.st_mtime, status.st_ctime)
            size += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return newest, size


def delete(root: Path, path: Path, *, committed: bool = False) -> bool:
    """Delete a leftover; whether it went. Data leaves by one rename, and comes back where its manifest came meanwhile.

    committed: delete data that has a manifest too.
    Raises WriteError where deleting fails.
    """
    gone = path
    try:
        if path.parent.name == "segments":
            gone = root / "tmp" / uuid.uuid4().hex
            os.rename(path, gone)
            if not committed and (root / "manifests" / f"{path.name}.json").exists():
                os.rename(gone, path)
                return False
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone)
        else:
            gone.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise WriteError(f"{path}: can't be deleted ({error.strerror or error}); check your permissions") from error
    return True


def aside(root: Path) -> FolderStore:
    """A cache inside of one, for what must not take part in it."""
    if (root / "aside").is_symlink():
        raise _linked(root / "aside")
    store = FolderStore(root / "aside")
    store.create()
    return store


def move_aside(root: Path, segment_id: str) -> None:
    """Move what there is of a segment to `aside`, the manifest first: readers see all of it or nothing."""
    store = aside(root)
    with _staging(root) as stage:
        for name in (f"manifests/{segment_id}.json", f"segments/{segment_id}"):
            with suppress(FileNotFoundError):  # what was set aside before goes
                os.rename(store.path / name, stage / name.partition("/")[0])
            with suppress(FileNotFoundError):
                os.rename(root / name, store.path / name)
                sync((root / name).parent)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A new folder under tmp/, gone afterwards, unless it tells whose data was left in segments/. Raises WriteError."""
    stage = root / "tmp" / uuid.uuid4().hex
    try:
        for folder in FOLDERS:
            _make_folders(root / folder)
            if (root / folder).is_symlink():
                raise _linked(root / folder)
        os.mkdir(stage)
        yield stage
    except OSError as error:
        todo = ADVICE.get(error.errno or 0, "check the disk and run the command again")
        what = f"can't write ({error.strerror or error}): {todo}; what was committed before is kept"
        raise WriteError(f"{root}: {what}") from error
    finally:
        if (stage / "data").exists() or not (stage / "manifest.json").exists():  # else what has moved lacks it
            shutil.rmtree(stage, ignore_errors=True)


def _linked(path: Path) -> CorruptError:
    return CorruptError(f"{path}: is a symbolic link; the format wants plain files")


def _make_folders(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    if not path.is_dir():
        _make_folders(path.parent)
        with suppress(FileExistsError):  # another process was faster; a file there fails at its first use as a folder
            os.mkdir(path)
        sync(path.parent)


def _holds(folder: Path, packed: Packed) -> bool:
    """Whether a folder has all files of a segment, with the same bytes."""
    try:
        return all(read_file(folder / name, len(data)) == data for name, data in packed.files.items())
    except (CacheError, FileNotFoundError):
        return False
