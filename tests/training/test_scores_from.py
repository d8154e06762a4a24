"""`learn --scores-from`: the same weights as with the teacher in the process, and clear words where nobody scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.index_file import HOME_VARIABLE
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cli import main
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.sharing import remote_cache
from ketchup_cache.training import scores_from as module
from ketchup_cache.training.scores_from import ScoresFrom
from tests.helpers.learning import TASK, assert_same_weights, config, following, killed_before
from tests.helpers.segments import fill, make_scores, scores_info, teacher

SAMPLING = ["--student", str(TASK / "predistilled"), "--samples", "2", "--max-new-tokens", "16", "--device", "cpu"]
LEARNING = ["--steps", "4", "--refresh-every", "2", "--batch-size", "8", "--lr", "1e-3", "--checkpoint-every", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """A cache with prompts and a few rollouts of the student, and what `learn --teacher` makes of a copy."""
    folder = tmp_path_factory.mktemp("resident")
    data = ["--data", str(TASK / "prompts.jsonl"), "--limit", "16", "--first", "4", "--cache", str(folder / "cache")]
    assert main(["rollout", *SAMPLING, *data]) == 0
    shutil.copytree(folder / "cache", folder / "learned")
    words = ["--cache", str(folder / "learned"), "--teacher", str(TASK / "teacher"), "--out", str(folder / "run")]
    assert main(["learn", *SAMPLING, *LEARNING, *words]) == 0
    return folder


@pytest.fixture
def cache(resident, tmp_path):
    return shutil.copytree(resident / "cache", tmp_path / "cache")


def learn(cache: Path, out: Path, *words: object) -> int:
    return main(["learn", *SAMPLING, *LEARNING, "--cache", str(cache), "--out", str(out), *map(str, words)])


def counts(cache: Path | str) -> dict[str, int]:
    kinds = [manifest.kind for _, manifest in remote_cache.open_cache(cache).manifests()]
    return {kind: kinds.count(kind) for kind in ("prompts", "rollouts", "scores")}


def test_in_the_cache_itself_by_two_scorers_at_once(cache, resident, tmp_path):
    with following(cache), following(cache):
        assert learn(cache, tmp_path / "run", "--scores-from", "cache") == 0
    assert_same_weights(tmp_path / "run", resident / "run")
    assert verify(open_cache(cache), deep=True).ok
    assert sum(ref.rows for ref in open_cache(cache).scored()) == 8 + 16
    times = json.loads((tmp_path / "run" / "report.json").read_text())
    assert min(times["sample_s"], times["score_s"], times["train_s"]) > 0


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_through_another_place_killed_and_resumed_and_with_outages(cache, resident, tmp_path, url, monkeypatch, capsys):
    copy, calls = module.copy, []

    def at_times(*arguments, **options):
        calls.append(arguments)
        if len(calls) in (2, 3, 5):  # bringing the first scores here, and the second rollouts there
            raise CacheError("cut off")
        return copy(*arguments, **options)

    words = ["--scores-from", url, "--scores-timeout", 60]
    with following(url):
        monkeypatch.setattr(module, "copy", at_times)
        with killed_before(3):
            learn(cache, tmp_path / "run", *words)
        monkeypatch.setattr(module, "copy", copy)
        assert learn(cache, tmp_path / "run", *words) == 0
    assert capsys.readouterr().err.count("cut off; trying again") == 3
    assert_same_weights(tmp_path / "run", resident / "run")
    assert counts(cache) == counts(url) == {"prompts": 1, "rollouts": 2, "scores": 2}
    # all is scored: the same run in another folder needs nobody
    assert learn(cache, tmp_path / "again", "--scores-from", url, "--scores-timeout", 0.5) == 0
    assert_same_weights(tmp_path / "again", resident / "run")


def test_nobody_scores(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SAY_EVERY_S", 0.3)
    lab = tmp_path / "lab"
    assert learn(cache, tmp_path / "run", "--scores-from", lab, "--scores-timeout", 1.1) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "rollouts wait" in line]
    assert 2 <= len(lines) <= 5
    assert f"8 rollouts wait for scores at {lab}, and none came for" in lines[0]
    assert f"`ketchup-cache score --follow --cache {lab} --teacher TEACHER` running?" in lines[0]
    assert lines[-1].endswith("then run this again to go on")
    assert counts(lab) == {"prompts": 1, "rollouts": 1, "scores": 0}


def test_a_place_that_is_no_cache_is_refused_at_once(cache, tmp_path, capsys):
    (tmp_path / "home" / "ana").mkdir(parents=True)
    assert learn(cache, tmp_path / "run", "--scores-from", tmp_path / "home") == 2
    assert "is not a ketchup cache" in capsys.readouterr().err.splitlines()[-1]


def test_one_teacher_is_chosen_and_kept(tmp_path):
    """That of --scored-by, the only one that has scored all rows, or the one that the run has learned from."""
    cache = open_cache(tmp_path / "cache", create=True)
    _, rollouts_id, _ = fill(cache)  # by `teacher`
    rollouts = cache.load_rollouts(rollouts_id)

    def ask(kept=None, **options):
        options = config(tmp_path, ["s"], scores_from="cache", scores_timeout=0.1, **options)
        return ScoresFrom(options)(cache, [rollouts_id], kept)[0]

    cache.commit_scores(make_scores(rollouts, 0, 2), scores_info(rollouts_id, 0, 2, by="half"))
    assert ask() == teacher().fingerprint
    cache.commit_scores(make_scores(rollouts, 2, 3), scores_info(rollouts_id, 2, 3, by="half"))
    with pytest.raises(ConfigError, match=r"teacher \(.*\), half \(.*\) have all scored .*--scored-by"):
        ask()
    assert ask(scored_by="half") == ask(scored_by=teacher("half").fingerprint[:9]) == teacher("half").fingerprint
    assert ask(kept=teacher().fingerprint) == teacher().fingerprint
    for options in ({"scored_by": "nobody"}, {"kept": "0" * 64}, {"method": "reverse-kl", "keep_top": 5}):
        with pytest.raises(CacheError, match="3 rollouts wait"):
            ask(**options)
