"""Several teachers and task rewards: returns against sums of each teacher's own, and a student that a reward moves."""

import itertools
import json
import sys

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.errors import CacheError, DataError, MismatchError
from ketchup_cache.method.mixture import mixture_top, weighted_scores
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.scoring.score import score
from ketchup_cache.training.goal import Goal
from ketchup_cache.training.learn import learn
from ketchup_cache.training.policy_gradient import learning_signal
from ketchup_cache.types import TopLogits
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import assert_same_weights, config, killed_before, metrics, run, whole_batch
from tests.helpers.models import save_model, write_prompts
from tests.helpers.oracle import random_rollouts
from tests.helpers.scoring import TEACHERS

KINDS = [
    {"k": 1}, {"k": 3}, {"k": 2, "tail": "jump", "end_weight": 0.5}, {"weights": "flat", "lam": 0.5},
    {"weights": "gae", "lam": 0.7}, {"weights": "mean"},
]  # fmt: skip


@pytest.fixture
def third(tmp_path):
    """Another teacher."""
    return save_model(tmp_path / "third", "1.1", seed=5)


@pytest.fixture
def both(tmp_path, folders, third):
    """A cache with rollouts that `teacher` and `third` have scored; and options to learn from it."""
    make_cache(tmp_path / "cache", *folders, segments=2)
    score(ScoreConfig(teacher=str(third), cache=tmp_path / "cache", device="cpu", commit_tokens=20))
    return config(tmp_path, folders, scored_by=f"teacher,{third}", teacher_weights=(0.75, 0.5), k=2)


def goal_of(options: LearnConfig) -> Goal:
    return Goal(options, options, load_tokenizer(options.student))


@pytest.mark.parametrize("normalization", ["raw", "centred", "logprob", "advantage"])
@pytest.mark.parametrize("unfinished", ["bootstrap", "zero", "drop"])
def test_the_return_of_summed_scores_is_the_sum_of_the_returns(normalization, unfinished):
    prompts, rollouts = random_rollouts(3, 9)
    parts = [TEACHERS[version].score(prompts, rollouts, batch_tokens=500) for version in ("1.0", "1.1")]
    weights = np.random.default_rng(0).random((2, 9)) * 2
    how = {"normalization": normalization, "unfinished": unfinished}
    ours = rollout_returns(rollouts, weighted_scores(parts, weights, rollouts.completions, 60), KINDS, **how)
    each = [rollout_returns(rollouts, part, KINDS, **how) for part in parts]
    for kind, found in enumerate(ours):
        for row, column in itertools.product(range(9), range(found.shape[1])):
            expected = sum(weights[i, row] * each[i][kind][row, column] for i in range(2))
            assert found[row, column] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("keep", [5, 60])
def test_kept_logits_become_those_of_the_mixture(keep):
    rng = np.random.default_rng(1)
    logits, weights = rng.normal(0, 2, (2, 7, 60)), rng.random((2, 7))
    tops, rest = [], np.zeros(7)
    probs = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    for i, values in enumerate(logits):
        ids = np.argsort(-values, 1)[:, :keep]
        others = np.exp(values).sum(1) - np.exp(np.take_along_axis(values, ids, 1)).sum(1)
        with np.errstate(divide="ignore"):
            lse = np.log(others if keep < 60 else np.zeros(7))
        top = np.take_along_axis(values, ids, 1).astype(np.float32)
        tops.append(TopLogits(top, ids.astype(np.int32), lse.astype(np.float32)))
        rest += weights[i] / weights.sum(0) * (1 - np.take_along_axis(probs[i], ids, 1).sum(1))
    mixture = (weights[..., None] * probs).sum(0) / weights.sum(0)[:, None]
    found = mixture_top(tops, weights, 60)
    for row in range(7):
        assert len(set(found.ids[row].tolist())) == keep
        error = np.abs(np.exp(found.q[row]) - mixture[row, found.ids[row]])
        assert error.max() < (1e-6 if keep == 60 else rest[row])
        assert np.exp(found.q[row]).sum() + np.exp(found.rest_logsumexp[row]) == pytest.approx(1, abs=1e-5)
        if keep == 60:
            assert (np.diff(found.q[row]) <= 0).all()


def test_a_row_counts_once_each_teacher_has_scored_it(both, tmp_path, third):
    """Ranges of one teacher's segments cut those of the other."""
    cache, (of_third,) = open_cache(both.cache), [t for t in open_cache(both.cache).teachers() if t.name == str(third)]
    refs = cache.scored(("teacher", str(third)))
    assert len(refs) > 2
    assert sum(ref.rows for ref in refs) == 12
    goal = goal_of(both)
    for ref in refs:
        part, loaded = cache.load_scored(ref), goal.load(cache, ref)
        other = np.concatenate([row.q for row in cache.rows(of_third.fingerprint)])
        of_teacher = np.concatenate([row.q for row in cache.rows("teacher")])
        start = int(np.flatnonzero(of_teacher == part.scores.q[0])[0])
        expected = 0.75 * part.scores.q + 0.5 * other[start : start + len(part.scores.q)]
        np.testing.assert_allclose(loaded.scores.q, expected, rtol=1e-5)


def test_two_teachers_learn_what_their_sum_teaches_and_resume(both, tmp_path):
    whole = both.model_copy(update={"steps": 6, "checkpoint_every": 2, "out": tmp_path / "whole"})
    learn(whole)
    killed = whole.model_copy(update={"out": tmp_path / "killed"})
    with killed_before(5):
        learn(killed)
    assert learn(killed).resumed_from > 0
    assert_same_weights(whole.out, killed.out)
    pinned = (whole.out / "pins.json").read_text()
    assert all(id_ in pinned for id_, _ in open_cache(both.cache).manifests("scores"))
    alone = both.model_copy(update={"scored_by": "teacher", "teacher_weights": ("0.75",), "out": tmp_path / "alone"})
    learn(alone)
    assert metrics(alone.out)[0]["return_mean"] != metrics(whole.out)[0]["return_mean"]


def test_divergences_take_the_mixture(tmp_path, folders, third):
    cache = make_cache(tmp_path / "cache", *folders)
    options = config(tmp_path, folders, method="reverse-kl", keep_top=8, scored_by=f"{folders[1]},{third}")
    refuses(CacheError, "no teacher", learn, options)
    for teacher in (folders[1], third):
        score(ScoreConfig(teacher=str(teacher), cache=cache.path, device="cpu", keep_top=8))
    by = [i.fingerprint for i in open_cache(cache.path).teachers()]
    report = learn(options.model_copy(update={"scored_by": ",".join(by)}))
    assert report.first["loss"] > 0


def test_live_teachers_each_score_every_refresh(tmp_path, folders, third):
    write_prompts(tmp_path / "d.jsonl", 8)
    run("rollout", "--student", folders[0], "--data", tmp_path / "d.jsonl", "--cache", tmp_path / "cache", "--first", 2)
    options = config(tmp_path, folders, teacher=f"{folders[1]},{third}", refresh_every=2, steps=4, samples=2)
    learn(options)
    cache = open_cache(options.cache)
    rows = [sum(ref.rows for ref in cache.scored(name)) for name in (str(folders[1]), str(third))]
    assert rows[0] == rows[1] == sum(cache.manifest(i).rows for i, _ in cache.rollouts())


# --------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_is_outside_the_clip_and_before_the_baseline(tmp_path, folders):
    batch = whole_batch(make_cache(tmp_path / "cache", *folders, forced=True))
    options = config(tmp_path, folders, k=2, clip_return=3.0, baseline="mean", reward="a:b", reward_weight=-2.0)
    reward = np.random.default_rng(0).normal(0, 10, len(batch))
    found = learning_signal(batch, options, reward=reward)
    plain = learning_signal(batch, options.model_copy(update={"baseline": "none"}))
    rows = np.repeat(np.arange(len(batch)), batch.rollouts.completions.lengths)
    step = np.concatenate([np.arange(n) for n in batch.rollouts.completions.lengths])
    value = [float(plain.advantage[i]) - 2.0 * reward[rows[i]] for i in range(len(rows))]
    for i in range(len(rows)):
        same = [value[j] for j in range(len(rows)) if step[j] == step[i] and plain.in_loss[j]]
        if plain.in_loss[i]:
            assert found.advantage[i] == pytest.approx(value[i] - sum(same) / len(same), abs=1e-4)
    assert np.abs(plain.advantage).max() <= 3 < np.abs(found.advantage).max()


REWARDS = """
def twos(prompts, completions, targets, level, **more):
    assert all(p.split()[0] in p and more["finished"][i] in (True, False) for i, p in enumerate(prompts))
    assert all(t == [" ".join(reversed(p.removesuffix("</s>").split()))] for p, t in zip(prompts, targets))
    return [c.split().count("two") * (n > 0) for c, n in zip(completions, level)]

def none(completions):
    return [None] * len(completions)

def short(completions):
    return [1.0]

def fails(completions):
    raise KeyError("no such thing")
"""


@pytest.fixture
def rewarded(tmp_path, folders, monkeypatch):
    """Data with a column `level`, and the options of a run that a reward alone moves."""
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards_of_test", raising=False)
    write_prompts(tmp_path / "d.jsonl", 12)
    lines = enumerate((tmp_path / "d.jsonl").read_text().splitlines(), start=1)
    lines = [json.loads(line) | {"level": i} for i, line in lines]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("rollout", "--student", folders[0], "--data", tmp_path / "d.jsonl", "--cache", tmp_path / "cache", "--first", 1)
    given = {"reward": "rewards_of_test:twos", "reward_data": str(tmp_path / "d.jsonl"), "teacher": str(folders[1])}
    given |= {"teacher_weights": (0,), "refresh_every": 1, "batch_size": 24, "samples": 4, "max_new_tokens": 6}
    return config(tmp_path, folders, **given, steps=25, lr=1e-2, baseline="mean")


def test_a_reward_alone_makes_the_student_write_a_word(rewarded):
    learn(rewarded)
    means = [line["reward_mean"] for line in metrics(rewarded.out)]
    assert np.mean(means[-4:]) > np.mean(means[:4]) + 1
    assert all(line["return_mean"] == 0 for line in metrics(rewarded.out))


def test_a_column_is_a_reward_and_a_weight(rewarded, tmp_path):
    options = rewarded.model_copy(update={"reward": "column:level", "teacher_weights": ("column:level",), "steps": 1})
    learn(options)
    (line,) = metrics(options.out)
    assert 1 <= line["reward_mean"] <= 12
    path = tmp_path / "d.jsonl"
    path.write_text(path.read_text().replace('"level": 3}', '"level": "high"}'))
    message = r"d\.jsonl: row 3: 'level' is 'high', not a number; fill it in"
    refuses(DataError, message, learn, options.model_copy(update={"out": tmp_path / "other"}))
    path.write_text(path.read_text().replace('"level": "high"}', '"level": 30}'))
    again = options.model_copy(update={"steps": 2})
    refuses(MismatchError, "is not what it was when the run began", learn, again)
    path.write_text("\n".join(path.read_text().splitlines()[6:]))
    message = "has no row for prompt .* give the data and the template that `rollout` was given"
    refuses(DataError, message, learn, options.model_copy(update={"out": tmp_path / "third"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "gives no number for 24 completions of a batch"), ("short", r"gives \[1\] values for 24 completions"),
     ("fails", "KeyError: 'no such thing'"), ("twos", "TypeError: .*level")],
)  # fmt: skip
def test_a_reward_without_numbers_is_one_line(rewarded, name, message):
    data = {} if name != "twos" else {"reward_data": ""}
    options = rewarded.model_copy(update={"reward": f"rewards_of_test:{name}", **data})
    refuses(DataError, message, learn, options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scored-by", "A,B", "--teacher-weights", "1"], "teacher_weights has 1 for 2 teachers"),
        (["--scored-by", "A,B", "--exact"], "exact takes the kept logits of one teacher"),
        (["--method", "minillm", "--teacher-weights", "0.5"], "exact takes the kept logits of one teacher"),
        (["--scored-by", "A,B", "--cost", "kl", "--teacher-weights", "1,1"], "sum to 1"),
        (["--teacher-weights", "0"], "nothing would be learned"),
        (["--teacher-weights", "-1"], "0 or more"),
        (["--reward", "column:x"], "column:x is a column of --reward-data"),
        (["--reward-data", "x.jsonl"], "reward_data is for --reward"),
        (["--reward", "nothing"], "package.module:function"),
        (["--reward", "os:nothing"], "--reward os:nothing: can't be imported"),
        (["--method", "js", "--reward", "os:getcwd"], "has no returns: leave --reward out"),
        (["--teacher-url", "http://a/v1", "--teacher-name", "b", "--scored-by", "A,B"], "teacher_url is one teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, tmp_path, folders, words, message):
    make_cache(tmp_path / "cache", *folders, prompts=2)
    given = ["learn", "--student", folders[0], "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert message in fails(capsys, *given, *words)


def test_scores_that_one_teacher_lacks_are_said(both, tmp_path, folders, third):
    cache = make_cache(tmp_path / "cache", *folders, seed=3)
    message = "12 rollouts that teacher has scored lack scores of another of --scored-by"
    refuses(CacheError, message, learn, both.model_copy(update={"cache": cache.path}))
