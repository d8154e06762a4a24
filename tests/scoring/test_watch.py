"""A teacher that scores for others: watchers that share work and die, and hostile notes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ketchup_cache.cache.cache import open_cache as open_folder
from ketchup_cache.cache.garbage import collect
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.scoring.watch import Watcher, watch
from ketchup_cache.sharing import base, presence
from ketchup_cache.sharing import remote_cache as view
from ketchup_cache.sharing.board import MAX_NOTE_BYTES, ClaimNote, ScorerNote, open_board, parse
from ketchup_cache.sharing.folder import LocalBoard
from ketchup_cache.sharing.presence import Patience, Presence
from ketchup_cache.sharing.transfer import copy
from ketchup_cache.training import waiting
from tests.helpers.segments import exit_code, in_child
from tests.helpers.segments import teacher as made_up
from tests.helpers.watchers import MadeUp, Shifted, add_rollouts, options, scorer_note, until, watching


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(presence, "BEAT_S", 0.3)  # dead after 1.8 s: a busy machine must not look like death
    monkeypatch.setattr(waiting, "LAST_POLL_S", 0.1)
    monkeypatch.setenv(view.HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path):
    return open_folder(tmp_path / "lab", create=True)


def scored_rows(cache) -> dict[tuple[str, int], int]:
    """(rollouts, row) → how often it was scored."""
    times: dict[tuple[str, int], int] = {}
    for _, manifest in cache.manifests("scores"):
        for row in range(manifest.info.row_start, manifest.info.row_stop):
            key = manifest.info.rollouts, row
            times[key] = times.get(key, 0) + 1
    return times


def notes(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root / "watch")) for p in (root / "watch").rglob("*") if not p.is_dir())


# ---------------------------------------------------------------------------------------------------- watchers


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_two_watchers_share_the_work(url, monkeypatch):
    """Every row is scored, by both, and none twice."""
    monkeypatch.setattr(presence, "BEAT_S", 0.5)
    there = view.open_cache(url, create=True)
    add_rollouts(there, 6)
    scorers = [MadeUp(lambda id_: time.sleep(0.03), pieces=2) for _ in range(2)]
    with watching(url, scorers[0], idle_exit=0.3) as one, watching(url, scorers[1], idle_exit=0.3) as two:
        add_rollouts(view.open_cache(url), 2, seed=50)  # and while they are at work
        reports = [one.result(30), two.result(30)]
    there.refresh()
    times = scored_rows(there)
    assert len(times) == 8 * 4
    assert set(times.values()) == {1}
    assert sum(r.computed for r in reports) == 8 * 4
    assert min(len(s.asked) for s in scorers) >= 3
    board = open_board(url)
    assert not [name for folder in ("scorers", "claims", "waiting", "refused") for name in board.list(folder)]


def test_a_range_that_was_scored_while_we_looked_is_not_scored_again(cache, monkeypatch):
    """Another watcher commits, and drops its claim, between our look and our claim."""
    (id_,) = add_rollouts(cache, 1)
    scorer, other = MadeUp(), MadeUp()
    create = LocalBoard.create

    def late(board, name, data):
        if name.startswith("claims/") and not other.asked:
            other.score_range(cache, id_, range(4), type("Bar", (), {"advance": lambda self, n: None})())
        return create(board, name, data)

    monkeypatch.setattr(LocalBoard, "create", late)
    with watching(cache.path, scorer, idle_exit=0.1) as running:
        assert running.result(20).segments == 0
    assert scorer.asked == []
    assert set(scored_rows(cache).values()) == {1}
    assert notes(cache.path) == []


@pytest.mark.parametrize("kind", [LocalBoard, Shifted])
def test_work_of_a_killed_watcher_is_taken_over(cache, kind, monkeypatch):
    monkeypatch.setattr("ketchup_cache.sharing.board.LocalBoard", kind)
    ids = add_rollouts(cache, 3)
    pid = in_child(lambda: watch(options(cache.path), MadeUp(lambda id_: time.sleep(60))))
    try:
        claims = cache.path / "watch" / "claims"
        until(lambda: claims.exists() and any(p.suffix == ".json" for p in claims.iterdir()))
        scorer = MadeUp()
        with watching(cache.path, scorer, idle_exit=0.1) as running:
            until(lambda: len(scored_rows(cache)) == 8)
            time.sleep(3)  # many beats: the claim of the living one holds, and what it claims is not done
            assert len(scored_rows(cache)) == 8
            assert not running.done()
            os.kill(pid, signal.SIGKILL)
            report = running.result(20)
    finally:
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
    times = scored_rows(cache)
    assert {id_ for id_, _ in times} == set(ids)
    assert set(times.values()) == {1}
    assert (report.taken_over, report.segments) == (1, 3)
    assert [name for name in notes(cache.path) if not name.startswith("scorers/")] == []


def test_of_three_that_see_a_dead_claim_one_takes_over(cache):
    (id_,) = add_rollouts(cache, 1)
    board = open_board(cache.path)
    dead = ClaimNote(scorer=uuid.uuid4().hex, start=0, stop=4)
    for n in range(2):  # the one that took over first died too
        board.create(f"claims/{made_up().fingerprint[:12]}-{id_}-0.{n}.json", dead.model_dump_json().encode())
    scorers = [MadeUp(lambda id_: time.sleep(0.3)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        reports = list(
            pool.map(lambda s: Watcher(options(cache.path, idle_exit=0.2), s, threading.Event()).run(), scorers)
        )
    assert sorted(len(s.asked) for s in scorers) == [0, 0, 1]
    assert sum(r.taken_over for r in reports) == 1
    assert notes(cache.path) == []


def test_a_claim_on_overlapping_rows_is_respected(cache):
    """Another watcher may cut its ranges elsewhere."""
    (id_,) = add_rollouts(cache, 1, rows=8)
    board = open_board(cache.path)
    scorer = MadeUp(pieces=4)
    with Presence(board, "scorers", scorer_note()) as other:
        name = f"claims/{made_up().fingerprint[:12]}-{id_}-1.0.json"
        board.create(name, ClaimNote(scorer=other.id, start=1, stop=5).model_dump_json().encode())
        with watching(cache.path, scorer) as running:
            until(lambda: len(scored_rows(cache)) == 3)
            time.sleep(0.3)
            assert sorted(row for _, row in scored_rows(cache)) == [5, 6, 7]
            assert not running.done()
            board.delete(name)
            until(lambda: len(scored_rows(cache)) == 8)
    assert set(scored_rows(cache).values()) == {1}


@pytest.mark.parametrize("between", [False, True], ids=["before a look", "within a look"])
def test_a_claim_that_was_given_up_and_made_again_is_another_one(cache, monkeypatch, between):
    """Also where the old claim was read, and then the scorers, of which its owner is not one any more."""
    (id_,) = add_rollouts(cache, 1)
    board, scorer = open_board(cache.path), MadeUp()
    name = f"claims/{made_up().fingerprint[:12]}-{id_}-0.0.json"
    old, new = "a" * 32, "b" * 32

    def claim(owner):
        board.write(f"scorers/{owner}.json", scorer_note(beat_s=60.0))
        board.write(name, ClaimNote(scorer=owner, start=0, stop=4).model_dump_json().encode())

    calls, work_on = [], Watcher._work_on

    def late(watcher, rollouts_id, rows, claimed, alive):
        calls.append(alive)
        if len(calls) == 2:
            claim(new)
            board.delete(f"scorers/{old}.json")
            if between:
                alive = alive - {old}
        return work_on(watcher, rollouts_id, rows, claimed, alive)

    monkeypatch.setattr(Watcher, "_work_on", late)
    claim(old)
    with watching(cache.path, scorer):
        until(lambda: len(calls) >= 5)
        held = notes(cache.path)
    assert (calls[0], calls[-1]) == ({old}, {new})
    assert scorer.asked == []
    assert name in held
    assert f"{name.removesuffix('.0.json')}.1.json" not in held


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drops_the_range_at_hand_and_ends_with_a_report(cache, number, tmp_path):
    add_rollouts(cache, 2)
    begun, go = tmp_path / "begun", tmp_path / "go"

    def slow(id_):
        if begun.exists():
            return until(go.exists)
        return begun.touch()

    def work():
        report = watch(options(cache.path), MadeUp(slow))
        assert report.segments == 1

    pid = in_child(work)
    until(lambda: len(scored_rows(cache)) == 4 and [n for n in notes(cache.path) if n.startswith("claims/")])
    os.kill(pid, number)
    time.sleep(0.1)
    go.touch()
    assert exit_code(pid) == 0
    assert len(scored_rows(cache)) == 4
    assert notes(cache.path) == []


def test_what_somebody_waits_for_comes_first(cache):
    ids = add_rollouts(cache, 4)
    board = open_board(cache.path)
    asked = waiting.WaitingNote(rollouts=(ids[2],), beat_s=0.1).model_dump_json().encode()
    scorer = MadeUp()
    with Presence(board, "waiting", asked), watching(cache.path, scorer, idle_exit=0.05) as running:
        running.result(20)
    assert [id_ for id_, _ in scorer.asked] == [ids[2], ids[0], ids[1], ids[3]]


def test_what_can_not_be_scored_is_passed_over_once(cache, capsys):
    """By all watchers, while the one that found out lives. The rest is scored."""
    ids = add_rollouts(cache, 3)

    def bad(id_):
        if id_ == ids[1]:
            raise NumericsError("rollout row 2: teacher gives NaN\x1b[2J")

    first, second = MadeUp(bad), MadeUp(bad)
    with watching(cache.path, first) as one:
        until(lambda: len(scored_rows(cache)) == 8)
        (refused,) = (n for n in notes(cache.path) if n.startswith("refused/"))
        with watching(cache.path, second, idle_exit=0.2) as two:
            assert two.result(20).refused == 0
        time.sleep(0.2)
        assert not one.done()
    assert (one.result().refused, [id_ for id_, _ in first.asked].count(ids[1])) == (1, 1)
    assert second.asked == []
    assert refused.endswith(f"-{ids[1]}.json")
    assert notes(cache.path) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(lines) == 1
    assert "gives NaN" in lines[0]
    assert "\x1b" not in lines[0]
    third = MadeUp()  # a new one tries again
    with watching(cache.path, third, idle_exit=0.05) as three:
        assert three.result(20).segments == 1


def test_an_outage_of_the_store_is_waited_for(cache, monkeypatch, capsys):
    add_rollouts(cache, 1)
    monkeypatch.setattr(Patience, "failed", lambda self, error: 0.05)
    scorer, listed = MadeUp(), LocalBoard.list
    monkeypatch.setattr(LocalBoard, "list", lambda self, folder: (_ for _ in ()).throw(CacheError("cut off")))
    with watching(cache.path, scorer, idle_exit=0.1) as running:
        time.sleep(0.4)
        assert not running.done()
        monkeypatch.setattr(LocalBoard, "list", listed)
        assert running.result(20).segments == 1
    assert "cut off; trying again in" in capsys.readouterr().err


def test_notes_of_another_day_are_deleted(cache):
    """An object store has no gc."""
    at = cache.path / "watch" / "waiting"
    at.mkdir(parents=True)
    for name, age in (("old", 90_000), ("young", 80_000)):
        (at / f"{name}.json").write_bytes(b"{}")
        os.utime(at / f"{name}.json", (time.time() - age,) * 2)
    with watching(cache.path, MadeUp(), idle_exit=0.01) as running:
        running.result(20)
    assert notes(cache.path) == ["waiting/young.json"]


# ------------------------------------------------------------------------------------------------- hostile notes


def litter(root: Path, ids: list[str]) -> None:
    """What anybody who may write there could leave."""
    digits, claim = made_up().fingerprint[:12], {"scorer": "0" * 32, "start": 0, "stop": 4}
    contents = [
        b"", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"x" * (MAX_NOTE_BYTES + 1), b"[]", b"NaN",
        json.dumps({**claim, "start": -1}).encode(), json.dumps({**claim, "stop": 10**400}).encode(),
        json.dumps({**claim, "x": 1}).encode(), json.dumps({**claim, "scorer": "../../x"}).encode(),
        b'{"beat_s": 1e999, "rollouts": []}', b'{"scorer": "' + b"0" * 32 + b'", "message": "no"}',
    ]  # fmt: skip
    for folder in ("scorers", "waiting", "claims", "refused"):
        at = root / "watch" / folder
        at.mkdir(parents=True, exist_ok=True)
        for i, content in enumerate(contents):
            (at / f"{i:032x}.json").write_bytes(content)
            id_ = ids[i % len(ids)]
            name = {"claims": f"{digits}-{id_}-0.{i}.json", "refused": f"{digits}-{id_}.json"}.get(folder, f"n{i}.json")
            (at / name).write_bytes(content)
        for name in (f"{digits}-{ids[0]}-99999999999999999999.0.json", f"{digits}-..-0.0.json", "é\n.json", ".json"):
            (at / name).write_bytes(contents[-1])
        (at / f"{digits}-{ids[0]}-0.77.json").symlink_to("/etc/hostname")
        os.mkfifo(at / f"{digits}-{ids[0]}-0.78.json")
        (at / f"{digits}-{ids[0]}-0.79.json").mkdir()
        (at / "sub").mkdir()


def test_hostile_notes_are_as_if_they_were_not_there(cache):
    ids = add_rollouts(cache, 3)
    litter(cache.path, ids)
    board = open_board(cache.path)
    for folder, kind in (("scorers", ScorerNote), ("claims", ClaimNote), ("waiting", waiting.WaitingNote)):
        found = [parse(board.read(f"{folder}/{name}"), kind) for name in board.list(folder)]
        assert not any(found), folder
    scorer = MadeUp()
    with watching(cache.path, scorer, idle_exit=0.1) as running:
        assert running.result(20).segments == 3
    assert set(scored_rows(cache).values()) == {1}
    assert len(scored_rows(cache)) == 12


def test_notes_are_no_part_of_the_cache(cache, tmp_path, capsys):
    ids = add_rollouts(cache, 2)
    with watching(cache.path, MadeUp(), idle_exit=0.05) as running:
        running.result(20)
    litter(cache.path.rename(tmp_path / "moved"), ids)
    lab = open_folder(tmp_path / "moved")
    assert verify(lab).ok
    copy(lab.path, tmp_path / "b")
    assert not (tmp_path / "b" / "watch").exists()
    assert main(["ls", str(lab.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["segments"]) == 5
    assert collect(lab).removed == ()
    with Presence(open_board(lab.path), "scorers", scorer_note()) as me:
        (lab.path / "watch" / "linked").symlink_to(lab.path / "manifests")
        time.sleep(1.2)
        removed = collect(lab, hours=0.9 / 3600).removed
        assert me.now() is not None
    assert len(removed) > 50
    assert not any(name.startswith("watch/linked/") for name in removed)
    assert len(lab.segment_ids()) == 5
