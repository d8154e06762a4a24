"""A commit is all or nothing: killed or failing at any step, alone or beside others."""

import os
from pathlib import Path

from ketchup_cache import open_cache
from ketchup_cache.cache import disk
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.segment_bytes import MARKER, Packed
from ketchup_cache.errors import WriteError
from tests.helpers.errors import refuses
from tests.helpers.segments import exit_code, fill, in_child, same
from tests.helpers.trust import NEW, Interrupted, count_steps, kill, stand_in


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
            stand_in(patch, Interrupted(at, kill))
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
            stand_in(patch, Interrupted(at, kill))
            code = exit_code(in_child(lambda root=root: open_cache(root, create=True)))
        assert open_cache(root, create=True).manifests() == []  # the rerun succeeds
        assert sorted(path.name for path in root.iterdir()) == ["ketchup-cache.json", "manifests", "segments", "tmp"]
        if code == 0:
            break
    assert at > 10


def test_a_read_only_folder_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(WriteError, "can't write", disk.create, tmp_path / "file" / "cache", b"{}")


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


def test_everything_is_synced_before_the_commit_and_the_commit_before_the_acknowledgement(tmp_path, monkeypatch):
    root = tmp_path / "new" / "cache"
    ledger = Ledger()
    stand_in(monkeypatch, ledger)
    cache = open_cache(root, create=True)
    assert not {p for p in ledger.unsynced if (root / "tmp") not in (p, *p.parents)}
    segment_id = cache.commit_prompts(*NEW)
    # names under tmp/ need not survive: the stage itself, and what has been moved out of it
    assert ledger.lost_at_commit is not None
    lost = {p for p in ledger.lost_at_commit if not (p == root / "tmp" or p.parent == root / "tmp")}
    assert lost == set()
    assert {p for p in ledger.unsynced if (root / "tmp") not in (p, *p.parents)} == set()
    assert same(open_cache(root).load_prompts(segment_id), NEW[0])  # every write was cut after 5 bytes, and continued
