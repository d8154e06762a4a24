"""The board of notes beside a shared cache, and who counts as alive."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ketchup_cache.cache.cache import open_cache as open_folder
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing import base, presence
from ketchup_cache.sharing import remote_cache as view
from ketchup_cache.sharing.board import MAX_NOTE_BYTES, ScorerNote, open_board, parse
from ketchup_cache.sharing.folder import LocalBoard
from ketchup_cache.sharing.presence import Living, Patience, Presence
from ketchup_cache.training import waiting
from tests.helpers.watchers import TASK, Shifted, scorer_note, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(presence, "BEAT_S", 0.3)
    monkeypatch.setattr(waiting, "LAST_POLL_S", 0.1)
    monkeypatch.setenv(view.HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path):
    return open_folder(tmp_path / "lab", create=True)


# ------------------------------------------------------------------------------------------------------- the board


def test_notes_of_every_kind_of_store(url):
    board = open_board(url)
    assert board.list("claims") == {}
    assert board.read("claims/a.json") is None
    board.delete("claims/a.json")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: board.create("claims/a.json", b"%d" % i), range(8)))
    assert made.count(True) == 1
    assert board.read("claims/a.json") == b"%d" % made.index(True)
    board.write("claims/a.json", b"other")
    board.write("claims/b.json", b"x" * (MAX_NOTE_BYTES + 9))
    assert board.read("claims/a.json") == b"other"
    assert not board.create("claims/a.json", b"third")
    assert len(board.read("claims/b.json")) == MAX_NOTE_BYTES + 1
    listed = board.list("claims")
    assert listed.keys() == {"a.json", "b.json"}
    assert all(abs(modified - time.time()) < 5 for modified in listed.values())
    assert board.list("scorers") == {}
    time.sleep(1.1)  # the resolution of an object store
    board.write("claims/a.json", b"other")
    again = board.list("claims")
    assert again["a.json"] > listed["a.json"]
    assert again["b.json"] == listed["b.json"]
    board.delete("claims/a.json")
    assert board.list("claims").keys() == {"b.json"}


def test_a_request_that_was_repeated_still_counts(url, monkeypatch):
    """The answer to the first one was lost: what is there is our own."""
    board = open_board(url)
    if isinstance(board, LocalBoard):
        link = os.link

        def twice(source, target):
            link(source, target)
            link(source, target)

        monkeypatch.setattr(os, "link", twice)
    else:
        board.write("claims/a.json", b"mine")
    assert board.create("claims/a.json", b"mine")
    monkeypatch.undo()
    assert not board.create("claims/a.json", b"yours")


def test_places_where_nothing_can_change_are_refused(capsys):
    for address in ("https://h/c", "hf://datasets/a/b"):
        for command in (
            ["score", "--teacher", str(TASK / "teacher"), "--watch", address],
            ["learn", "--student", str(TASK / "predistilled"), "--cache", "c", "--scorer", address],
        ):
            assert main(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "a path, s3://, gs:// or az://" in line
    assert not Path("c").exists()


def test_a_folder_that_can_not_be_written_is_one_line(cache):
    (cache.path / "watch").write_bytes(b"a file where the folder should be")
    board = open_board(cache.path)
    with pytest.raises(WriteError, match="scoring for others needs a folder"):
        board.write("scorers/a.json", b"{}")
    with pytest.raises(WriteError):
        board.create("claims/a.json", b"{}")


def test_a_note_that_is_too_long_is_none():
    assert parse(scorer_note(), ScorerNote)
    assert parse(scorer_note() + b" " * MAX_NOTE_BYTES, ScorerNote) is None


# ------------------------------------------------------------------------------------------------- who is alive


@pytest.mark.parametrize("kind", [LocalBoard, Shifted])
def test_life_is_told_from_the_stores_own_times(cache, kind, monkeypatch):
    """The clock of this machine may say anything."""
    monkeypatch.setattr(time, "time", lambda: 7.0)
    board = kind(cache.path, MAX_NOTE_BYTES)
    living = Living(board, "scorers", ScorerNote)
    with Presence(board, "scorers", scorer_note()) as me, Presence(board, "scorers", scorer_note()) as other:
        path = cache.path / "watch" / "scorers"
        dead, early, late = (path / f"{name}.json" for name in ("dead", "early", "late"))
        for file in (dead, early, late):
            file.write_bytes(scorer_note())
        at = path.joinpath(f"{me.id}.json").stat().st_mtime
        os.utime(dead, (at - 60, at - 60))
        os.utime(early, (at + 60, at + 60))
        os.utime(late, (at, at))
        assert living.look(me.now()).keys() == {me.id, other.id, "late"}
        time.sleep(2.7)
        assert living.look(me.now()).keys() == {me.id, other.id}
        (path / f"{me.id}.json").unlink()
        assert living.look(None).keys() >= {other.id, "dead", "late"}
        until(lambda: me.now())  # it is written again
    assert not (cache.path / "watch" / "scorers" / f"{other.id}.json").exists()


def test_a_heartbeat_goes_on_through_an_outage(cache, monkeypatch):
    board = open_board(cache.path)
    write, broken = board.write, threading.Event()

    def failing(name, data):
        if broken.is_set():
            raise WriteError("gone")
        write(name, data)

    board.write = failing
    with Presence(board, "scorers", scorer_note()) as me:
        first = me.now()
        broken.set()
        time.sleep(0.9)
        broken.clear()
        until(lambda: me.now() > first + 0.3)


def test_patience_ends(monkeypatch):
    patience, error = Patience(), CacheError("gone")
    assert [patience.failed(error) for _ in range(6)] == [2, 4, 8, 16, 30, 30]
    patience.worked()
    assert patience.failed(error) == 2
    monkeypatch.setattr(presence, "PATIENCE_S", -1)
    with pytest.raises(CacheError, match="gone"):
        patience.failed(error)
