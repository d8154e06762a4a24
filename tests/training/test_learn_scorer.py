"""`learn --scorer`: the same weights as with the teacher in the process, and clear words where nobody scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ketchup_cache.cache.cache import open_cache as open_folder
from ketchup_cache.cli import main
from ketchup_cache.config.resolve import resolve
from ketchup_cache.errors import CacheError, ConfigError, NumericsError
from ketchup_cache.scoring.watch import watch
from ketchup_cache.sharing import base, presence
from ketchup_cache.sharing import remote_cache as view
from ketchup_cache.sharing.board import RefusalNote, ScorerNote, open_board
from ketchup_cache.sharing.presence import Presence
from ketchup_cache.training import waiting
from tests.helpers.models import save_model
from tests.helpers.segments import exit_code, in_child
from tests.helpers.segments import teacher as made_up
from tests.helpers.watchers import TASK, options, watching

SAMPLING = ["--student", str(TASK / "predistilled"), "--samples", "2", "--max-new-tokens", "16", "--device", "cpu"]
LEARNING = ["--steps", "4", "--refresh-every", "2", "--batch-size", "8", "--lr", "1e-3", "--unfinished", "bootstrap"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    _hurry(monkeypatch, tmp_path)


def _hurry(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(presence, "BEAT_S", 0.5)
    monkeypatch.setattr(waiting, "FIRST_POLL_S", 0.02)
    monkeypatch.setattr(waiting, "LAST_POLL_S", 0.05)
    monkeypatch.setenv(view.HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A cache with prompts and a few rollouts of the student."""
    folder = tmp_path_factory.mktemp("sampled") / "cache"
    data = ["--data", str(TASK / "prompts.jsonl"), "--limit", "16", "--first", "4", "--cache", str(folder)]
    assert main(["rollout", *SAMPLING, *data]) == 0
    return folder


@pytest.fixture
def cache(sampled, tmp_path):
    return shutil.copytree(sampled, tmp_path / "cache")


@pytest.fixture(scope="module")
def resident(sampled, tmp_path_factory):
    """What `learn --teacher` comes to."""
    folder = tmp_path_factory.mktemp("resident")
    shutil.copytree(sampled, folder / "cache")
    words = ["--cache", str(folder / "cache"), "--teacher", str(TASK / "teacher"), "--out", str(folder / "run")]
    assert main(["learn", *SAMPLING, *LEARNING, *words]) == 0
    return folder


def learn(cache: Path, out: Path, *words: object) -> int:
    return main(["learn", *SAMPLING, *LEARNING, "--cache", str(cache), "--out", str(out), *map(str, words)])


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def counts(cache: Path | str) -> dict[str, int]:
    kinds = [manifest.kind for _, manifest in view.open_cache(cache).manifests()]
    return {kind: kinds.count(kind) for kind in ("prompts", "rollouts", "scores")}


def test_in_a_shared_folder_with_another_process(cache, resident, tmp_path):
    from ketchup_cache.scoring.score import Scorer

    config = options(cache, teacher=str(TASK / "teacher"))
    refused = RefusalNote(scorer="0" * 32, message="of a scorer that is dead").model_dump_json().encode()
    info = Scorer(config, config.teacher).info
    board = open_board(cache)
    for id_, _ in open_folder(cache).rollouts():
        board.write(f"refused/{info.fingerprint[:12]}-{id_}.json", refused)
    pid = in_child(lambda: watch(config, Scorer(config, config.teacher)))
    try:
        assert learn(cache, tmp_path / "run", "--scorer", "watch") == 0
    finally:
        os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 0
    assert weights(tmp_path / "run") == weights(resident / "run")
    assert counts(cache) == counts(resident / "cache") == {"prompts": 1, "rollouts": 2, "scores": 2}
    assert json.loads((tmp_path / "run" / "teacher.json").read_text())["name"] == str(TASK / "teacher")
    assert {p.parent.name for p in (cache / "watch").rglob("*") if p.is_file()} == {"refused"}


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_through_another_place(cache, resident, tmp_path, url, capsys):
    """Rollouts go there and scores come here; killed between two steps of that, it goes on, and does nothing twice."""
    pull, calls = waiting.WaitForScores._pull, []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        pull(self, *arguments)

    with watching(url), pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting.WaitForScores, "_pull", killed)
        words = ["--scorer", url, "--checkpoint-every", 1]
        assert learn(cache, tmp_path / "run", *words) == 130
        assert counts(cache)["scores"] == 1
        assert counts(url) == {"prompts": 1, "rollouts": 2, "scores": 2}
        assert learn(cache, tmp_path / "run", *words) == 0
    assert len(calls) == 3
    assert weights(tmp_path / "run") == weights(resident / "run")
    assert counts(cache) == counts(url) == {"prompts": 1, "rollouts": 2, "scores": 2}
    board = open_board(url)
    assert not [n for folder in ("scorers", "claims", "waiting", "refused") for n in board.list(folder)]
    # all is scored: the same run in another folder needs nobody
    assert learn(cache, tmp_path / "again", "--scorer", url, "--scorer-timeout", 1) == 0
    assert weights(tmp_path / "again") == weights(resident / "run")


def test_nobody_is_scoring(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(waiting, "NOBODY_S", 0.3)
    monkeypatch.setattr(waiting, "REPEAT_S", 0.3)
    lab = tmp_path / "lab"
    capsys.readouterr()
    assert learn(cache, tmp_path / "run", "--scorer", lab, "--scorer-timeout", 1.1) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "nobody is scoring" in line]
    assert 3 <= len(lines) <= 5
    assert f"start `ketchup-cache score --watch {lab} --teacher …`" in lines[0]
    assert "8 rollouts wait" in lines[0]
    assert lines[-1].endswith("run this again to go on")
    assert counts(lab) == {"prompts": 1, "rollouts": 1, "scores": 0}
    assert not [p for p in (lab / "watch").rglob("*") if p.is_file()]


def test_a_place_that_is_no_cache_is_refused_at_once(cache, tmp_path, capsys):
    (tmp_path / "home" / "ana").mkdir(parents=True)
    capsys.readouterr()
    began = time.monotonic()
    assert learn(cache, tmp_path / "run", "--scorer", tmp_path / "home") == 2
    assert "is not a ketchup cache" in capsys.readouterr().err.splitlines()[-1]
    assert time.monotonic() - began < 5


def test_an_outage_while_waiting_is_outlived(cache, resident, tmp_path, monkeypatch, capsys):
    """Of the store, at any of the things that a learner does there."""
    monkeypatch.setattr(presence.Patience, "failed", lambda self, error: 0.01)
    failed: list[str] = []

    def at_times(name):
        real = getattr(waiting.WaitForScores, name)

        def sometimes(self, *arguments):
            if self._reached and failed.count(name) < 2:
                failed.append(name)
                raise CacheError("cut off")
            return real(self, *arguments)

        monkeypatch.setattr(waiting.WaitForScores, name, sometimes)

    for name in ("_push", "_look", "_pull"):
        at_times(name)
    with watching(tmp_path / "lab"):
        assert learn(cache, tmp_path / "run", "--scorer", tmp_path / "lab", "--scorer-timeout", 10) == 0
    assert sorted(failed) == ["_look"] * 2 + ["_pull"] * 2 + ["_push"] * 2
    assert capsys.readouterr().err.count("cut off; trying again") == 6
    assert weights(tmp_path / "run") == weights(resident / "run")


def note(by: str, **more) -> bytes:
    values = {"teacher": made_up(by), "tokenizer": made_up(by).fingerprint, "keep_top": 0, "beat_s": 0.5, **more}
    return ScorerNote(**values).model_dump_json().encode()


def test_two_teachers_are_one_too_many(cache, tmp_path, capsys):
    board = open_board(cache)
    with Presence(board, "scorers", note("ana's")), Presence(board, "scorers", note("ben's")):
        assert learn(cache, tmp_path / "run", "--scorer", "watch") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        for name in ("ana's", "ben's"):
            assert f"{name} ({made_up(name).fingerprint[:12]}" in line
        assert "--scored-by" in line
        # one of them is asked for, or is the only one that has our tokenizer
        for words, more in ((["--scored-by", TASK / "teacher"], {}), ([], {})):
            with watching(cache, **more):
                assert learn(cache, tmp_path / f"run{len(words)}", "--scorer", "watch", *words) == 0
    assert not (tmp_path / "run" / "teacher.json").exists()


def test_a_run_keeps_its_teacher(cache, tmp_path, capsys):
    """Another teacher at the next refresh is not taken; with --scored-by it would not even be the first."""
    out, board = tmp_path / "run", open_board(cache)
    with watching(cache):
        assert learn(cache, out, "--scorer", "watch", "--checkpoint-every", 1) == 0
    for path in (out / "report.json", out / "student"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (cache / "manifests").iterdir():  # of the second phase
        if json.loads(path.read_bytes())["info"]["kind"] == "scores":
            path.unlink()
    capsys.readouterr()
    with Presence(board, "scorers", note("another")):
        assert learn(cache, out, "--scorer", "watch", "--checkpoint-every", 1, "--scorer-timeout", 0.5) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "(only another (" in line
    assert f"--teacher {TASK / 'teacher'}`" in line


def test_scores_that_keep_too_few_logits_do_not_count(cache, tmp_path, capsys):
    """js needs some; this scorer keeps none."""
    outputs = ["--student", str(TASK / "teacher"), "--greedy", "--max-new-tokens", "16", "--device", "cpu"]
    data = ["--data", str(TASK / "prompts.jsonl"), "--limit", "16", "--cache", str(cache)]
    assert main(["rollout", *outputs, *data]) == 0
    teacher = str(TASK / "teacher")
    assert main(["score", "--teacher", teacher, "--cache", str(cache), "--keep-top", "5", "--device", "cpu"]) == 0
    words = ["--scorer", "watch", "--method", "js", "--keep-top", "5", "--scorer-timeout", "0.7"]
    capsys.readouterr()
    with watching(cache):
        assert learn(cache, tmp_path / "run", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "keep-top 0)" in line
    assert "--keep-top 5`" in line
    with watching(cache, keep_top=5):
        assert learn(cache, tmp_path / "run", *words) == 0


@pytest.mark.parametrize("why", ["nan", "tokenizer"])
def test_rollouts_that_can_not_be_scored_end_the_wait(cache, tmp_path, capsys, why, monkeypatch):
    from ketchup_cache.scoring.score import Scorer
    from ketchup_cache.scoring.teacher import Teacher

    def broken(self, prompts, rollouts, **options):
        raise NumericsError(f"rollout row 3: teacher {self.info.name} gives NaN or infinite logits")

    bad = tmp_path / "bad"
    if why == "nan":  # of these rollouts only: a model that always gives NaN is refused when it is loaded
        shutil.copytree(TASK / "teacher", bad)
        monkeypatch.setattr(Teacher, "score", broken)
    else:
        save_model(bad, "1.1", seed=2)
    config = options(cache, teacher=str(bad))
    capsys.readouterr()
    with watching(cache, Scorer(config, str(bad))) as running:
        assert learn(cache, tmp_path / "run", "--scorer", "watch") == 2
        assert not running.done()
    line = capsys.readouterr().err.splitlines()[-1]
    assert {"nan": "NaN or infinite logits", "tokenizer": "encodes differently"}[why] in line
    assert ("the scorer passes these rollouts over: " in line) == (why == "nan")
    assert running.result().refused == (why == "nan")
    monkeypatch.undo()
    _hurry(monkeypatch, tmp_path)
    # the right one is taken by the next try, although the run had met the wrong one
    with watching(cache):
        assert learn(cache, tmp_path / "run", "--scorer", "watch") == 0


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("learn", {"scorer": "watch", "teacher": "t"}, "leave --teacher out, and say which with --scored-by"),
        ("learn", {"scorer": "watch", "method": "kl"}, "leave --scorer out"),
        ("learn", {"scorer": "watch", "baseline": "leave-one-out"}, "set --samples to 2 or more"),
        ("learn", {"scorer_timeout": "-1"}, "--scorer-timeout must be 0.0 or more"),
        ("score", {"teacher": "t"}, "give either --cache (score it once) or --watch"),
        ("score", {"teacher": "t", "cache": "c", "watch": "w"}, "give either --cache (score it once) or --watch"),
        ("score", {"teacher": "t", "watch": "w", "poll": "0"}, "--poll must be greater than 0"),
    ],
)
def test_rules(command, flags, message):
    own = {"student": "s", "cache": "c"} if command == "learn" else {}
    with pytest.raises(ConfigError) as caught:
        resolve(command, None, own | flags)
    (problem,) = caught.value.problems
    assert message in problem


def test_a_flag_passes_over_the_other_way_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("cache: c\nstudent: s\nteacher: t\n")
    assert (resolve("learn", file, {"scorer": "watch"}).teacher, resolve("learn", file, {}).teacher) == (None, "t")
    assert (resolve("score", file, {"watch": "w"}).cache, str(resolve("score", file, {}).cache)) == (None, "c")
    assert resolve("score", file, {"watch": "w"}).teacher == "t"
    file.write_text("cache: c\nstudent: s\nscorer: watch\nscore: {watch: w, teacher: t}\n")
    assert resolve("learn", file, {"teacher": "t"}).scorer is None
    assert str(resolve("score", file, {}).watch) == "w"
    assert resolve("score", file, {"cache": "d"}).watch is None
    assert resolve("learn", file, {}, "xsum").teacher is None
