"""Each alarm in a run that goes wrong that way, once; none in one that does not. Repetition against a loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.config.options import StepOptions
from ketchup_cache.training.alarms import TEXTS, Alarms
from ketchup_cache.training.metrics import repetition
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient_step, reweighted_return
from ketchup_cache.types import Ragged
from tests.helpers.browser import data_of
from tests.helpers.caches import make_cache
from tests.helpers.learning import config, learner_of, whole_batch
from tests.helpers.models import VOCAB, make_t5
from tests.helpers.oracle import plain_logits

QUIET = {"unfinished": 0.0, "tail": 0.2, "ess": 0.9, "entropy": 1.0, "repetition": 0.01, "length_mean": 20.0}
ON_POLICY = {"teacher": "t", "refresh_every": 4}
DEMO = data_of(Path(__file__).parents[2] / "docs/demo-report.html")
"""Of three real runs; their curves are not thinned."""


def lines(steps: int = 40, **changed) -> Iterator[dict]:
    """Metrics of a run of which these drift from the quiet value to the given one, with some noise."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        drift = {name: QUIET[name] + (value - QUIET[name]) * step / steps for name, value in changed.items()}
        noisy = QUIET | drift | {"length_mean": drift.get("length_mean", 20.0) + rng.normal(0, 0.3)}
        yield {"step": step, "refreshed": step % 4 == 0, "return_mean": -20.0 + step / 10, **noisy}


def raised(options: dict, steps, dev=()) -> list[str]:
    alarms, at = Alarms(LearnConfig(student="s", cache="c", **options)), {record["step"]: record for record in dev}
    found = []
    for line in steps:
        if line["step"] in at:
            found += alarms.dev(at[line["step"]])
        found += alarms.step(line)
    assert [alarm.name for alarm in found] == list(alarms.raised)
    assert all("\n" not in alarm.text and "{" not in alarm.text for alarm in found)
    return [alarm.name for alarm in found]


def records(values, length=20.0, name="bleu") -> list[dict]:
    return [
        {"step": 16 * i, "metrics": {name: value}, "length_mean": 20 + (length - 20) * i / (len(values) - 1)}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    [
        ("unfinished", {}, {"unfinished": 0.5}),
        ("ess", {}, {"ess": 0.05}),
        ("entropy", {}, {"entropy": 0.2}),
        ("repetition", ON_POLICY, {"repetition": 0.6}),
        ("length", ON_POLICY, {"length_mean": 28.0}),
        ("length", ON_POLICY, {"length_mean": 14.0}),
    ],
)
def test_what_drifts_in_the_metrics_raises_its_alarm_once(name, options, changed):
    assert raised(options, lines(**changed)) == [name]


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [("tails", {"k": 16}, {"tail": 0.7}), ("dropped", {"unfinished": "drop"}, {"unfinished": 0.3})],
)
def test_what_shows_in_the_first_batch(name, options, first):
    assert raised(options, [{**next(lines()), **first}]) == [name]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"k": 16, "tail": "jump"}, {"tail": 0.9}),
        ({"k": 1}, {"tail": 0.9}),
        ({}, {"unfinished": 0.9}),
        ({"method": "seqkd", "unfinished": "drop"}, {"tail": 0.9, "unfinished": 0.9}),
    ],
)
def test_what_does_not_matter_is_not_said(options, first):
    assert raised(options, [{**next(lines()), **first}]) == []


def test_a_quiet_run_raises_nothing():
    """Nor does the fixed length of other rollouts, offline."""
    assert raised(ON_POLICY, lines(80), records([30, 31, 32, 33, 32.8])) == []
    assert raised({}, lines(length_mean=28.0)) == []


@pytest.mark.parametrize(("values", "name"), [([30, 33, 31.5, 31, 30.5], "bleu"), ([2.0, 1.5, 1.8, 1.9, 2.05], "loss")])
def test_return_up_and_dev_metric_down_is_the_hack(values, name):
    assert raised(ON_POLICY, lines(80), records(values, name=name)) == ["hacked"]
    falling = [line | {"return_mean": -20.0 - line["step"]} for line in lines(80)]
    assert raised(ON_POLICY, falling, records(values, name=name)) == ["return"]
    assert raised(ON_POLICY, lines(80), records(values, name="return")) == []
    assert raised({}, lines(80), records(values, name=name)) == []


def test_the_return_on_the_dev_set_comes_before_that_of_the_rollouts():
    made = list(enumerate(records([30, 33, 31.5, 31, 30.5])))

    def with_returns(sign: int) -> list[dict]:
        return [r | {"metrics": r["metrics"] | {"return": sign * i - 20.0}} for i, r in made]

    assert raised(ON_POLICY, lines(80), with_returns(1)) == ["hacked"]
    assert raised(ON_POLICY, lines(80), with_returns(-1)) == ["return"]


def noise(seed: int) -> list[str]:
    """A refresh at every step, of few rollouts: as a run that learns nothing looks."""
    rng = np.random.default_rng(seed)
    noisy = [
        line | {"refreshed": True, "length_mean": max(4, rng.normal(12, 4)), "entropy": rng.gamma(2, 0.2),
                "return_mean": rng.normal(-18, 4)}
        for line in lines(80)
    ]  # fmt: skip
    return raised(ON_POLICY, noisy, records([30, 33, 31.5, 31, 30.5]))


def test_noise_alone_raises_next_to_nothing():
    """Of 50 such runs, each looked at after every step, one at most has an alarm."""
    assert sum(bool(noise(seed)) for seed in range(50)) <= 1


@pytest.mark.parametrize("run", DEMO["runs"], ids=lambda run: run["name"])
def test_a_demo_run_whose_return_rises_is_quiet_and_told_backwards_a_fall_of_a_tenth_is_said(run):
    """The return rises by 5, 6 and 11 % of its size: backwards, the last is beyond a tenth."""
    options = ON_POLICY | {"refresh_every": (every := run["config"]["options"]["refresh_every"])}
    returns = run["curves"]["return_mean"][1]
    for told, expected in ((returns, []), (returns[::-1], ["return"] if run["name"] == "exact" else [])):
        steps = [
            line | {"refreshed": i % every == 0, "return_mean": told[i]} for i, line in enumerate(lines(len(told)))
        ]
        assert raised(options, steps) == expected
        assert raised({}, [line | {"refreshed": False} for line in steps]) == []


@pytest.mark.parametrize("every", [1, 4, 16])
def test_a_return_must_fall_beyond_the_noise_of_the_refreshes(every):
    """Steps of one refresh are alike: fifty runs of noise, one alarm at most; a fall of six times the noise, always."""
    found = {0: 0, 12: 0}
    for fall in found:
        for seed in range(50 if not fall else 5):
            rng = np.random.default_rng(seed)
            prompts = rng.normal(-18, 2, 20).repeat(every)
            steps = [
                line
                | {"refreshed": i % every == 0, "return_mean": rng.normal(prompts[i] - fall * (i > len(prompts) / 2))}
                for i, line in enumerate(lines(len(prompts)))
            ]
            found[fall] += raised(ON_POLICY | {"refresh_every": every}, steps) == ["return"]
    assert found[0] <= 1
    assert found[12] == 5


def test_the_return_on_the_dev_set_must_be_lower_twice():
    for values, expected in (
        ([-20, -18, -23, -19], []),
        ([-20, -23, -21.9, -25], []),
        ([-20, -19, -23, -24], ["return"]),
    ):
        assert raised({}, lines(80), records(values, name="return")) == expected


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ([30, 28, 28], "bleu", ["worse"]),
        ([30, 28, 29, 28], "bleu", []),  # once, and once
        ([30, 28.6, 28.6, 28.6], "bleu", []),
        ([2.0, 2.2, 2.2], "loss", ["worse"]),
        ([30, 28], "bleu", []),
    ],
)
def test_a_dev_metric_below_its_start_is_said_offline_too(values, name, expected):
    assert raised({}, lines(80), records(values, name=name)) == expected


def test_length_on_the_dev_set_counts_too():
    assert raised(ON_POLICY, lines(80), records([30, 31, 32, 33, 34], length=25.0)) == ["length"]


def test_every_text_is_tried_and_says_what_to_do():
    """A text without a remedy is no alarm."""
    assert all(";" in text and "--" in text for text in TEXTS.values())


def test_repetition_counts_n_grams_that_came_before():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 3, n) for n in (0, 3, 4, 30, 1, 50)]
    seen, repeated, total = set(), 0, 0
    for number, row in enumerate(rows):
        for i in range(len(row) - 3):
            gram = (number, *row[i : i + 4].tolist())
            repeated, total = repeated + (gram in seen), total + 1
            seen.add(gram)
    assert 0 < repeated < total
    assert repetition(Ragged.from_rows(rows, np.int32)) == pytest.approx(repeated / total)
    assert repetition(Ragged.from_rows([[1, 2, 3]], np.int32)) == repetition(Ragged.from_rows([], np.int32)) == 0


def test_entropy_tail_and_the_reweighted_return_equal_their_definitions(tmp_path, folders):
    """By plain forward passes of the policy, rollout by rollout."""
    batch = whole_batch(make_cache(tmp_path / "cache", *folders, forced=True, stale=0.7))
    learner, model = learner_of(folders[0], config(tmp_path, folders, k=3)), make_t5("1.0", seed=1)
    rollouts, scores = batch.rollouts, batch.scores
    weights, returns, surprise, ratios = [], [], [], []
    for row, completion in enumerate(rollouts.completions):
        at = slice(*rollouts.completions.offsets[row : row + 2])
        prompt = batch.prompts.tokens[rollouts.prompt_index[row]]
        logprob = plain_logits(model, prompt, completion)[:, :VOCAB].double().log_softmax(1)
        logprob = logprob[range(len(completion)), completion.tolist()].numpy()
        free = ~rollouts.forced[at]
        ratio = np.exp(logprob - rollouts.behavior_logprob[at])[free]
        surprise += (-logprob[free]).tolist()
        ratios += ratio.tolist()
        weights.append(ratio.prod())
        value = scores.logsumexp[at]
        gaps = scores.q[at][:-1] - scores.max_q[at][1:] + value[1:] - value[:-1]
        returns.append(gaps.sum() + scores.q[at][-1] - value[-1])  # cut or not: what follows a cut is bootstrapped
    mean, ess = reweighted_return(learner, batch)
    w = np.array(weights)
    assert ess == pytest.approx(w.sum() ** 2 / (len(w) * (w * w).sum()), rel=1e-4)
    assert mean == pytest.approx((w * returns).sum() / w.sum(), rel=1e-4)
    found = policy_gradient_step(learner, batch, 0)
    assert found.entropy == pytest.approx(np.dot(ratios, surprise) / np.sum(ratios), rel=1e-4)
    lengths = rollouts.completions.lengths
    assert found.tail == pytest.approx(sum(min(n, 3) for n in lengths) / sum(lengths))


@pytest.mark.parametrize("warmup", [0, 5, 0.1])
def test_learning_rates(warmup):
    """Cosine and linear, by their formulas; a warm-up below 1 is a share of the steps."""
    steps, first = 50, 5 if warmup else 0
    for schedule, left in (("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2), ("linear", lambda x: 1 - x)):
        optimizer = Optimizer(make_t5(), StepOptions(lr=2.0, schedule=schedule, warmup=warmup), steps)
        for step in range(steps):
            warm = min(1, (step + 1) / (first + 1))
            expected = 2.0 * (warm if step < first else left((step - first) / (steps - first)))
            assert optimizer.lr(step) == pytest.approx(expected)
        assert optimizer.lr(steps) == pytest.approx(0, abs=1e-12)
