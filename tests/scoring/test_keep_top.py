"""From `score --keep-top` to `learn --method`, by the commands: what is stored, scored again, refreshed and resumed."""

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.scoring.score import score
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.training.source import Offline
from tests.helpers.caches import make_cache
from tests.helpers.learning import Killed, assert_same_weights, killed_before, metrics, run
from tests.helpers.models import VOCAB, write_prompts
from tests.helpers.oracle import plain_logits
from tests.helpers.segments import scores_of


def assert_top(cache, teacher, top: int, rows: int) -> None:
    """Every row once, and its kept logits and the rest are those of plain forward passes."""
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    refs, done = cache.scored(keep_top=top), 0
    for ref in refs:
        part = cache.load_scored(ref)
        assert cache.manifest(ref.scores_id).info.keep_top >= min(top, VOCAB)
        scores = part.scores.with_top(min(top, VOCAB))
        for row, completion in enumerate(part.rollouts.completions):
            prompt = part.prompts.tokens[part.rollouts.prompt_index[row]]
            span = slice(*part.rollouts.completions.offsets[row : row + 2])
            logits = plain_logits(model, prompt, completion)[:, :VOCAB].numpy()
            plain = scores_of(logits, completion, np.zeros(1, np.float32), min(top, VOCAB)).top
            np.testing.assert_allclose(scores.top.q[span], plain.q, atol=1e-4)
            at_ids = np.take_along_axis(logits, scores.top.ids[span].astype(int), 1)
            np.testing.assert_allclose(scores.top.q[span], at_ids, atol=1e-4)
            np.testing.assert_allclose(scores.top.rest_logsumexp[span], plain.rest_logsumexp, atol=1e-4)
            done += 1
    assert done == rows


@pytest.fixture
def add(tmp_path, folders):
    """Adds a segment of the same 8 rollouts, with scores that keep nothing, to the cache at `tmp_path`."""
    return lambda: make_cache(tmp_path, *folders, prompts=4)


@pytest.fixture
def scored(tmp_path, folders):
    """`score` there: rows that had scores, that went through the teacher, and that were copied."""

    def run_score(keep_top: int, **more) -> tuple[int, int, int]:
        given = {"teacher": str(folders[1]), "cache": tmp_path, "device": "cpu", "keep_top": keep_top}
        report = score(ScoreConfig(**given, **more))
        return report.already, report.computed, report.copied

    return run_score


@pytest.mark.parametrize("top", [1, 5, 64])
def test_the_largest_logits_are_stored(tmp_path, folders, add, scored, top):
    """Beside scores without them, which don't count then; 64 is all of this vocabulary."""
    add()
    already, *done = scored(top)
    assert (already, sum(done)) == (0, 8)
    cache = open_cache(tmp_path)
    assert_top(cache, folders[1], top, 8)
    assert len(cache.scored()) == 1  # each row once, be it with or without
    assert scored(top) == (8, 0, 0)


@pytest.mark.parametrize("before", [(4, 16), (16,)])
def test_four_and_then_sixteen(tmp_path, folders, add, scored, monkeypatch, before):
    """More logits than there are: computed again. Fewer: nothing to do. The same text again: copied, cut to size."""
    add()
    assert not any(scored(n)[0] for n in before)
    assert_top(open_cache(tmp_path), folders[1], 16, 8)
    monkeypatch.setattr(Teacher, "load", None)
    assert [scored(fewer) for fewer in (16, 4, 0)] == [(8, 0, 0)] * 3

    # the same rollouts as another segment: copies of those that keep enough, without the teacher
    add()
    kept = {id_ for id_, _ in open_cache(tmp_path).manifests("scores")}
    assert scored(4) == (8, 0, 8)
    cache = open_cache(tmp_path)
    assert [m.info.keep_top for id_, m in cache.manifests("scores") if id_ not in kept] == [4]
    assert_top(cache, folders[1], 4, 16)
    assert sum(ref.rows for ref in cache.scored(keep_top=16)) == 8
    assert scored(16) == (8, 0, 8)
    assert_top(open_cache(tmp_path), folders[1], 16, 16)


def test_a_part_of_the_rows_with_and_a_part_without(tmp_path, folders, add, scored, monkeypatch):
    """A run that was killed between two commits goes on with the rows that are left."""
    add()
    commit, commits = Cache.commit_scores, []

    def dying(self, *arguments):
        if len(commits) == 2:
            raise Killed
        commits.append(commit(self, *arguments))
        return commits[-1]

    monkeypatch.setattr(Cache, "commit_scores", dying)
    with pytest.raises(Killed):
        scored(3, commit_tokens=12)
    monkeypatch.undo()
    cache = open_cache(tmp_path)
    done = sum(ref.rows for ref in cache.scored(keep_top=3))
    assert 0 < done < 8
    assert sum(ref.rows for ref in cache.scored()) == 8
    # learning wants all rows, and says what to run
    options = {"student": str(folders[0]), "cache": tmp_path, "keep_top": 3, "method": "kl"}
    with pytest.raises(Exception, match=f"{8 - done} of the rollouts .* largest logits .*--keep-top 3"):
        Offline(cache, LearnConfig(**options, teacher_outputs=str(folders[0])))
    already, *rest = scored(3, commit_tokens=12)
    assert (already, sum(rest)) == (done, 8 - done)
    assert_top(open_cache(tmp_path), folders[1], 3, 8)


# ------------------------------------------------------------------------------------------------- on-policy

LEARN = "--steps 7 --refresh-every 3 --batch-size 8 --samples 2 --lr 1e-3 --checkpoint-every 2 --keep-top 5".split()
COMMON = ["--device", "cpu", "--max-new-tokens", 6]


def words(tmp_path, folders, name: str, method: str) -> list[str]:
    """A cache with prompts and the teacher's scored outputs, and the words of a `learn` command."""
    data, cache = write_prompts(tmp_path / "d.jsonl", 20), tmp_path / f"{name}-cache"
    run("rollout", "--student", folders[1], "--greedy", "--data", data, "--cache", cache, *COMMON)
    run("score", "--teacher", folders[1], "--cache", cache, "--keep-top", 5, "--device", "cpu")
    made = ["--student", folders[0], "--teacher", folders[1], "--cache", cache, "--out", tmp_path / name]
    return ["learn", *made, "--method", method, *LEARN, *COMMON]


@pytest.mark.parametrize("method", ["js", "tvd", "reverse-kl"])
def test_on_policy_and_killed_it_ends_with_the_same_bits(tmp_path, folders, method):
    run(*words(tmp_path, folders, "whole", method))
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if line["refreshed"]] == [0, 3, 6]
    for line in lines:
        assert (line["dropped"], line["k_return_mean"], line["advantage_sd"]) == (0, None, None)
        if line["refreshed"]:  # of the student's half alone: the teacher's outputs have no ratio
            assert line["ratio_mean"] == pytest.approx(1, abs=1e-5)
            assert line["behavior_kl"] == pytest.approx(0, abs=1e-8)
        else:
            assert line["behavior_kl"] > 1e-8
    cache = open_cache(tmp_path / "whole-cache")
    refreshed = [m.info for _, m in cache.manifests("rollouts") if m.info.policy.step in (0, 3, 6)]
    assert {info.policy.step for info in refreshed} == {0, 3, 6}
    # 4 of 8 rollouts of a step are the student's, or all: 3 × 4 / 2 prompts a phase
    prompts = 12 if method == "reverse-kl" else 6
    assert sum(info.prompt_stop - info.prompt_start for info in refreshed) == 3 * prompts
    assert all(m.info.keep_top == 5 for _, m in cache.manifests("scores"))

    command = words(tmp_path, folders, "killed", method)
    for last in (1, 5):
        with killed_before(last):
            run(*command)
    if method == "js":  # a run that goes on reads the teacher outputs it began with, even if the cache has more by then
        make_cache(tmp_path / "killed-cache", folders[1], folders[1], prompts=4, seed=9)
        more = ScoreConfig(teacher=str(folders[1]), cache=tmp_path / "killed-cache", device="cpu", keep_top=9)
        assert score(more).computed > 0
    run(*command)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert [line["loss"] for line in metrics(tmp_path / "killed")] == [line["loss"] for line in lines]


def test_what_the_cache_holds_of_the_student_is_scored_again_with_logits(tmp_path, folders):
    """Rollouts of the first phase that were scored without, before."""
    command, cache, own = words(tmp_path, folders, "run", "js"), tmp_path / "run-cache", str(folders[0])
    rollout = ["--student", own, "--data", tmp_path / "d.jsonl", "--cache", cache, "--samples", 2, "--first", 3]
    run("rollout", *rollout, *COMMON)
    run("score", "--teacher", folders[1], "--cache", cache, "--device", "cpu")
    assert len(open_cache(cache).scored(policy=own)) == 1
    assert open_cache(cache).scored(policy=own, keep_top=5) == []
    run(*command, "--steps", 2)
    assert sum(ref.rows for ref in open_cache(cache).scored(policy=own, keep_top=5)) == 6
