"""A commit is all or nothing: killed or failing at any step, alone or beside others."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache import disk
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.segment_bytes import MARKER, Packed
from ketchup_cache.errors import WriteError
from tests.helpers.segments import exit_code, fill, in_child, make_prompts, prompts_info, same

STEPS = ("mkdir", "makedirs", "open", "write", "fsync", "close", "rename")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


class Interrupted:
    """Stands in for `os` inside disk.py: counts the steps on the file system, and does something at the n-th."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act, self.done = at, act, 0
        self.counting = threading.Lock()  # files are written in threads

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*args, **kwargs):
            with self.counting:
                self.done += 1
                now = self.done - 1
            if now == self.at:
                return self.act(name, real, args, kwargs)
            return real(*args, **kwargs)

        return step


def kill(name, real, args, kwargs):
    """Die before the step, which is after the one before; in the middle where half of the bytes can be written."""
    if name == "write":
        real(args[0], args[1][: len(args[1]) // 2])
    os._exit(9)


NEW = (make_prompts((2, 6), seed=9), prompts_info())


def count_steps(cache: Cache, monkeypatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", counter := Interrupted(-1, None))
        cache.commit_prompts(*NEW)
    return counter.done


def test_killed_at_every_step_leaves_all_or_nothing(tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "cache"
    cache = open_cache(root, create=True)
    fill(cache)
    steps = count_steps(cache, monkeypatch)
    assert steps > 20  # open, write, fsync and close of two files, then their folders
    visible = 0
    for at in range(steps + 1):  # the last one dies after the last step, before the acknowledgement
        before = dict(open_cache(root).manifests())
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", Interrupted(at, kill))
            pid = in_child(lambda: (cache.commit_prompts(*NEW), os._exit(9)))
            assert exit_code(pid) == 9
        reopened = open_cache(root)
        now = dict(reopened.manifests())
        assert before.items() <= now.items()
        new = list(now.keys() - before.keys())
        assert len(new) <= 1
        for segment_id in new:
            assert same(reopened.load_prompts(segment_id), NEW[0])
        visible += len(new)
    # only after the rename of the manifest, by which time all data is disk, can it be seen
    assert visible == 4
    report = verify(open_cache(root))
    assert report.ok, str(report)
    assert len(report.leftovers) > 0
    assert same(open_cache(root).load_prompts(cache.commit_prompts(*NEW)), NEW[0])


def test_killed_while_a_cache_is_made(tmp_path: Path, monkeypatch) -> None:
    for at in range(100):
        root = tmp_path / str(at) / "cache"
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", Interrupted(at, kill))
            code = exit_code(in_child(lambda root=root: open_cache(root, create=True)))
        assert open_cache(root, create=True).manifests() == []  # the rerun succeeds
        assert sorted(path.name for path in root.iterdir()) == ["ketchup-cache.json", "manifests", "segments", "tmp"]
        if code == 0:
            break
    assert at > 10


def test_an_error_at_every_step_is_one_line_and_acknowledges_nothing(tmp_path: Path, monkeypatch) -> None:
    root = tmp_path / "cache"
    cache = open_cache(root, create=True)
    family = fill(cache)
    steps = count_steps(cache, monkeypatch)
    for at in range(steps):
        number = DISK_ERRORS[at % len(DISK_ERRORS)]

        def fail(name, real, args, kwargs, number=number):
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
            raise OSError(number, os.strerror(number))

        before = {i for i, _ in open_cache(root).manifests()}
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", Interrupted(at, fail))
            with pytest.raises(WriteError) as caught:
                cache.commit_prompts(*NEW)
        message = str(caught.value)
        assert "\n" not in message
        assert str(root) in message
        assert os.strerror(number) in message
        assert "run the command again" in message or "choose a cache folder" in message
        assert list((root / "tmp").iterdir()) == []
        new = [i for i, _ in open_cache(root).manifests() if i not in before]
        assert not new or at >= steps - 3  # the last three steps make the rename, already done, disk
    report = verify(cache)
    assert report.ok
    cache.refresh()
    assert {i for i, _ in cache.manifests()} >= set(family)
    assert same(cache.load_prompts(cache.commit_prompts(*NEW)), NEW[0])


def test_a_read_only_folder_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="can't write"):
        disk.create(tmp_path / "file" / "cache", b"{}")


def test_data_left_by_a_crash_is_reused_or_replaced(tmp_path: Path) -> None:
    """The folder of a segment can be there before its manifest: whole, or damaged since."""
    root = tmp_path / "cache"
    open_cache(root, create=True)
    files = {"zarr.json": b"{}", "q/c/0": b"abc"}
    disk.publish(root, Packed("whole", b"first", files))
    inode = (root / "segments/whole/q/c/0").stat().st_ino
    disk.publish(root, Packed("whole", b"second", files))
    assert (root / "segments/whole/q/c/0").stat().st_ino == inode
    assert (root / "manifests/whole.json").read_bytes() == b"second"

    (root / "segments/whole/q/c/0").write_bytes(b"abd")
    disk.publish(root, Packed("whole", b"third", files))
    assert (root / "segments/whole/q/c/0").read_bytes() == b"abc"
    assert list((root / "tmp").iterdir()) == []


def commit_forever(root: Path, pipe: int, first: int, most: int = 10**9) -> None:
    cache = open_cache(root)
    for seed in range(first, first + most):
        segment_id = cache.commit_prompts(make_prompts((3, 0, 5), seed=seed), prompts_info())
        os.write(pipe, f"{segment_id} {seed}\n".encode())


def test_no_acknowledged_segment_is_lost_to_sigkill(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    open_cache(root, create=True)
    rng = random.Random(0)
    acknowledged: dict[str, int] = {}
    for run in range(20):
        read, write = os.pipe()
        pid = in_child(lambda write=write, run=run: commit_forever(root, write, run * 1000))
        os.close(write)
        with open(read, "rb") as acks:
            if run % 2:  # at least every other kill comes after a commit
                segment_id, seed = acks.readline().split()
                acknowledged[segment_id.decode()] = int(seed)
            time.sleep(rng.uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            assert exit_code(pid) == -signal.SIGKILL
            for line in acks:
                segment_id, seed = line.split()
                acknowledged[segment_id.decode()] = int(seed)
        seen = {i for i, _ in open_cache(root).manifests()}
        assert acknowledged.keys() <= seen
    assert len(acknowledged) >= 10
    cache = open_cache(root)
    for segment_id, seed in acknowledged.items():
        assert same(cache.load_prompts(segment_id), make_prompts((3, 0, 5), seed=seed))
    assert verify(cache).ok


def test_four_writers_and_a_reader_at_once(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    read, write = os.pipe()

    def work(first: int) -> None:
        open_cache(root, create=True)  # all four make the cache
        commit_forever(root, write, first, 25)

    pids = [in_child(lambda i=i: work(1000 * i)) for i in range(4)]
    os.close(write)
    # read along while they write: what is visible is whole
    os.set_blocking(read, False)
    seen: set[str] = set()
    text = b""
    open_acks = True
    while open_acks:
        try:
            data = os.read(read, 2**16)
            open_acks = bool(data)
            text += data
        except BlockingIOError:
            pass
        if (root / MARKER).exists():
            cache = open_cache(root)
            for segment_id, _ in cache.manifests("prompts"):
                if segment_id not in seen:
                    cache.load_prompts(segment_id)
                    seen.add(segment_id)
    os.close(read)
    assert [exit_code(pid) for pid in pids] == [0, 0, 0, 0]
    acknowledged = dict(line.split() for line in text.decode().splitlines())
    assert len(acknowledged) == 100
    cache = open_cache(root)
    assert {i for i, _ in cache.manifests()} == acknowledged.keys()
    for segment_id, seed in acknowledged.items():
        assert same(cache.load_prompts(segment_id), make_prompts((3, 0, 5), seed=int(seed)))


def test_another_process_makes_the_cache_between_two_looks(tmp_path: Path, monkeypatch) -> None:
    """No marker at the first look, and at the second a folder with one."""

    def just_now(folder: Path) -> list[str]:
        disk.create(folder, (tmp_path / "other" / MARKER).read_bytes())
        return os.listdir(folder)

    open_cache(tmp_path / "other", create=True)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "list_folder", just_now)
        open_cache(tmp_path / "cache", create=True)
    assert fill(open_cache(tmp_path / "cache"))


class Ledger:
    """Stands in for `os`: what a power cut would lose. Bytes and names count as lost until their own fsync."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.lost_at_commit: set[Path] | None = None

    def __getattr__(self, name: str):
        return getattr(os, name)

    def open(self, path, flags, *mode) -> int:
        file = os.open(path, flags, *mode)
        self.paths[file] = Path(path)
        if flags & os.O_CREAT:
            self.unsynced |= {Path(path), Path(path).parent}
        return file

    def write(self, file: int, data) -> int:
        self.unsynced.add(self.paths[file])
        return os.write(file, data[:5])  # short writes are allowed to happen

    def fsync(self, file: int) -> None:
        os.fsync(file)
        self.unsynced.discard(self.paths[file])

    def mkdir(self, path, *mode) -> None:
        os.mkdir(path, *mode)
        self.unsynced |= {Path(path).parent}

    def makedirs(self, path, **options) -> None:
        missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
        os.makedirs(path, **options)
        self.unsynced |= {folder.parent for folder in missing}

    def rename(self, source, target) -> None:
        if Path(target).parent.name == "manifests":
            self.lost_at_commit = set(self.unsynced)
        os.rename(source, target)
        # what was not synced under the old name still is not under the new one
        moved = {p for p in self.unsynced if p.is_relative_to(source)}
        self.unsynced = (self.unsynced - moved) | {Path(target) / p.relative_to(source) for p in moved}
        self.unsynced |= {Path(target).parent}


def test_everything_is_synced_before_the_commit_and_the_commit_before_the_acknowledgement(
    tmp_path: Path, monkeypatch
) -> None:
    root = tmp_path / "new" / "cache"
    ledger = Ledger()
    monkeypatch.setattr(disk, "os", ledger)
    cache = open_cache(root, create=True)
    assert not {p for p in ledger.unsynced if (root / "tmp") not in (p, *p.parents)}
    segment_id = cache.commit_prompts(*NEW)
    # names under tmp/ need not survive: the stage itself, and what has been moved out of it
    assert ledger.lost_at_commit is not None
    lost = {p for p in ledger.lost_at_commit if not (p == root / "tmp" or p.parent == root / "tmp")}
    assert lost == set()
    assert {p for p in ledger.unsynced if (root / "tmp") not in (p, *p.parents)} == set()
    assert same(open_cache(root).load_prompts(segment_id), NEW[0])  # every write was cut after 5 bytes, and continued
