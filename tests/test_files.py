"""Files and folders that are whole or not there, and progress that can be nested."""

import errno
import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from ketchup_cache import console as progress, files
from ketchup_cache.cli import main
from ketchup_cache.errors import WriteError
from tests.helpers.errors import fails, refuses
from tests.helpers.segments import fill
from tests.helpers.trust import Interrupted, failing, stand_in


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, at):
    """At each of open, write, fsync and close."""
    files.write_file(tmp_path / "a.json", b"old")
    stand_in(monkeypatch, Interrupted(at, failing(errno.ENOSPC)))
    with pytest.raises(WriteError, match=r"a\.json: can't be written \(No space left on device\)"):
        files.write_file(tmp_path / "a.json", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"old")]


def publish(target, *names) -> None:
    with files.publishing(target) as partial:
        for name in names:
            (partial / name).write_bytes(b"x")


@pytest.mark.parametrize("at", range(9))
def test_a_folder_is_published_whole_or_not_at_all(tmp_path, monkeypatch, at):
    """Two files, so three syncs before the folder takes its name; whichever step of them fails, it does not."""
    stand_in(monkeypatch, Interrupted(at, failing(errno.ENOSPC)))
    refuses(WriteError, "student: can't be written", publish, tmp_path / "student", "one", "two")
    assert not (tmp_path / "student").exists()
    monkeypatch.undo()
    publish(tmp_path / "student", "three")
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["three"]


@pytest.mark.parametrize("fails", ["partial", "old"])
def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch, fails):
    """Whichever of the two renames fails; and after a kill between them."""
    publish(tmp_path / "best", "one")
    rename = Path.rename

    def failing_rename(path, to):
        if fails in (path.suffix[1:], Path(to).suffix[1:]):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(WriteError):
        publish(tmp_path / "best", "two")
    monkeypatch.undo()
    if fails == "old":
        assert [p.name for p in (tmp_path / "best").iterdir()] == ["one"]
    else:
        (tmp_path / "best").rename(tmp_path / "best.old")  # as a kill leaves it
        with pytest.raises(TypeError):
            publish(tmp_path / "best", None)
        assert [p.name for p in (tmp_path / "best").iterdir()] == ["one"]
    publish(tmp_path / "best", "three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["three"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.publishing(tmp_path / "best") as partial:
            (partial / "weights").touch(mode=0o600)  # as some libraries write
    finally:
        os.umask(before)
    assert (tmp_path / "best" / "weights").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "best").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_error_inside_publishes_nothing(tmp_path):
    with pytest.raises(TypeError):
        publish(tmp_path / "student", "one", None)
    assert not (tmp_path / "student").exists()


def test_progress_within_progress_shares_the_terminal(monkeypatch):
    """A second live display would be an error; scoring within learning has one."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=screen, force_terminal=True, width=120))
    with progress.progress("learning", 2, "steps") as outer:
        for _ in range(2):
            with progress.progress("scoring", 5) as inner:
                inner.advance(5)
            outer.advance()
    assert outer.done == 2
    assert "learning" in screen.getvalue()
    assert "scoring" in screen.getvalue()


def test_progress_in_a_log_is_lines_with_rate_and_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for n in (500, 5):
        with progress.progress("scoring", 8 * n) as bar:
            for _ in range(4):
                clock[0] += 40
                bar.note("hit rate 5%")
                bar.advance(n)
    # a line a minute; at 80 s: 1,000 of 4,000, so 12.5 a second and four minutes left
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1,000 of 4,000 tokens (12/s, 4.0 min left) hit rate 5%",
        "scoring: 2,000 of 4,000 tokens (12/s, 2.7 min left) hit rate 5%",
        "scoring: 10 of 40 tokens (8.0 s each, 4.0 min left) hit rate 5%",
        "scoring: 20 of 40 tokens (8.0 s each, 2.7 min left) hit rate 5%",
    ]


def test_a_second_process_on_one_output_folder_is_refused(tmp_path, capsys):
    """Of `learn` and `pretrain`: `tests/training/test_learn.py`."""
    fill(tmp_path / "c")
    out = tmp_path / "out"
    for words, held in (
        (("export", tmp_path / "c", out, "--to", "parquet"), tmp_path / "out.partial"),
        (("analyze", "--cache", tmp_path / "c", "--out", out), out), (("demo", "--out", out), out),
    ):  # fmt: skip
        with files.holding(held):
            assert f"{out}: another process writes there" in fails(capsys, *words)
        held.rmdir()
    run = ["export", str(tmp_path / "c"), str(out), "--to", "parquet"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").write_text("by a kill")
    assert main(run) == 0
    assert [path.name for path in out.iterdir()] == ["rows.parquet"]
