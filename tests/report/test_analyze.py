"""Bias and variance from hand-made caches, against the definitions written out in plain Python."""

import itertools
import json
import math
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.errors import CacheError
from ketchup_cache.provenance import PolicyInfo, Sampling
from ketchup_cache.report.analyze import analyze
from ketchup_cache.types import PER_TOKEN, Prompts, Ragged, Rollouts, Scores
from tests.helpers.errors import refuses
from tests.helpers.returns import LITERAL
from tests.helpers.segments import fingerprint, prompts_info, rollouts_info, scores_info

OTHER = PolicyInfo(name="other", fingerprint=fingerprint("other"), step=40)


@dataclass(frozen=True)
class One:
    """One scored rollout: lists with a number for each token."""

    prompt: int
    q: list[float]
    max_q: list[float]
    logsumexp: list[float]
    mean_q: list[float]
    behavior_logprob: list[float]
    forced: list[bool]
    finished: bool
    final_max_q: float


def f32(value: float) -> float:
    """As the cache keeps it, so that both sides start from equal numbers."""
    return float(np.float32(value))


def make(rng: random.Random, prompt: int, finished: float = 0.8) -> One:
    """A random rollout; all of a prompt start in the same state, where the teacher says the same."""
    length = rng.randint(1, 14)
    start = random.Random(prompt)
    max_q = [f32((rng if t else start).uniform(10, 20)) for t in range(length)]
    gap = [f32(rng.choice([0, rng.expovariate(0.3)])) for _ in range(length)]
    done = rng.random() < finished
    return One(
        prompt,
        q=[f32(m - g) for m, g in zip(max_q, gap, strict=True)],
        max_q=max_q,
        logsumexp=[f32(m + (rng if t else start).uniform(0.1, 2)) for t, m in enumerate(max_q)],
        mean_q=[f32(m - (rng if t else start).uniform(5, 10)) for t, m in enumerate(max_q)],
        behavior_logprob=[f32(-rng.expovariate(1)) for _ in range(length)],
        forced=[rng.random() < 0.1 for _ in range(length)],
        finished=done,
        final_max_q=0.0 if done else f32(rng.uniform(10, 20)),
    )


class Builder:
    """Writes a cache of these prompts, segment by segment."""

    def __init__(self, path: Path, prompts: int) -> None:
        self.path, self.cache = path, open_cache(path, create=True)
        ids = np.random.default_rng(0).integers(0, 256, (prompts, 16), np.uint8)
        ids[:, -1] = 0  # the last byte may be zero
        tokens = Ragged.from_rows([[3, 1]] * prompts, np.int32)
        self.prompts_id = self.cache.commit_prompts(Prompts(ids, tokens), prompts_info())

    def add(self, rows: list[One], cuts: tuple[int, ...] = (), *, policy=None, **sampling):
        """A rollouts segment, and a scores segment for each piece between the cuts."""

        def flat(name: str, rows: list[One] = rows, dtype: type = np.float32) -> np.ndarray:
            return np.array([x for one in rows for x in getattr(one, name)], dtype)

        rollouts = Rollouts(
            prompt_index=np.array([one.prompt for one in rows], np.int64),
            completions=Ragged.from_rows([[5] * len(one.q) for one in rows], np.int32),
            behavior_logprob=flat("behavior_logprob"),
            forced=flat("forced", dtype=np.bool_),
            finished=np.array([one.finished for one in rows]),
        )
        changes = {"prompt_start": int(min(rollouts.prompt_index)), "sampling": Sampling(**sampling)}
        changes |= {"policy": policy} if policy else {}
        info = rollouts_info(self.prompts_id, max(rollouts.prompt_index) + 1).model_copy(update=changes)
        parent = self.cache.commit_rollouts(rollouts, info)
        for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
            part = rows[start:stop]
            final = np.array([one.final_max_q for one in part], np.float32)
            scores = Scores(**{name: flat(name, part) for name in PER_TOKEN}, final_max_q=final)
            self.cache.commit_scores(scores, scores_info(parent, start, stop))
        return self

    def analyze(self, **options):
        return analyze(AnalyzeConfig(cache=self.path, **options))


def literal_return(one: One, k: int, tail: str = "one-step", normalization: str = "raw", unfinished: str = "bootstrap"):
    """Ĝ_1 of Algorithm 1 or Eq. 7, on normalised logits."""
    offset = {"raw": [0.0] * len(one.q), "centred": one.mean_q, "logprob": one.logsumexp}[normalization]
    q, max_q = ([a - b for a, b in zip(logits, offset, strict=True)] for logits in (one.q, one.max_q))
    # an unfinished rollout subtracts the value of the state it was cut in, and may get it back (bootstrap)
    end = -one.final_max_q if not one.finished and unfinished == "zero" else 0.0
    return LITERAL[tail](q, max_q, k)[0] + end


def literal(rows: list[One], k: int, weigh=None, **options) -> dict[str, float]:
    """Variance and bias with their standard errors, by the definitions, with Python's statistics. weigh: of the gap j
    tokens later, in place of the K-step return's weights."""

    def estimate(one: One) -> float:
        if weigh is None:
            return literal_return(one, k, **options)
        gaps = [m - q for m, q in zip(one.max_q, one.q, strict=True)]
        return literal_return(one, 1, **options) + sum((1 - weigh(j)) * gaps[j] for j in range(1, len(gaps)))

    kept = [one for one in rows if one.finished or options.get("unfinished", "bootstrap") != "drop"]
    prompts = [[one for one in kept if one.prompt == p] for p in sorted({one.prompt for one in kept})]
    estimates = [[estimate(one) for one in prompt] for prompt in prompts]
    truths = [[literal_return(one, 1, **options) for one in prompt] for prompt in prompts]
    variances = [statistics.variance(e) for e in estimates if len(e) > 1]
    # the mean of differences is the difference of means
    biases = [statistics.fmean(e) - statistics.fmean(g) for e, g in zip(estimates, truths, strict=True)]
    found = {}
    for name, values in {"variance": variances, "bias": biases}.items():
        found |= {name: statistics.fmean(values), f"{name}_se": statistics.stdev(values) / math.sqrt(len(values))}
    flat = [g for prompt in truths for g in prompt]
    return found | {"return_mean": statistics.fmean(flat), "return_sd": statistics.stdev(flat)}


@pytest.fixture
def rows() -> list[One]:
    rng = random.Random(7)
    return [make(rng, prompt) for prompt in range(6) for _ in range(5)]


WAYS = [{}, {"tail": "jump", "unfinished": "bootstrap"}, {"normalization": "centred", "tail": "jump"}]
WAYS += [{"normalization": "raw", "unfinished": unfinished} for unfinished in ("zero", "drop")]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_equals_the_definitions(tmp_path: Path, rows: list[One], options: dict[str, str]):
    # a sixth prompt with a single finished rollout: it counts for the bias, not for the variance
    rows = rows + [replace(one, prompt=6, finished=i == 0, final_max_q=0.0) for i, one in enumerate(rows[:3])]
    result = Builder(tmp_path, 7).add(rows).analyze(**options)
    (policy,) = result.policies
    options = {"normalization": "logprob"} | options
    for point in policy["by_k"]:
        expected = literal(rows, point["k"], **options)
        for name in ("variance", "variance_se", "bias", "bias_se"):
            assert point[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), (point["k"], name)
    for point in policy["by_weights"]:
        weigh = {"flat": lambda j, lam: lam, "gae": lambda j, lam: lam**j}[point["weights"]]
        expected_other = literal(rows, 1, weigh=lambda j: weigh(j, point["lam"]), **options)  # noqa: B023
        for name in ("variance", "variance_se", "bias", "bias_se"):
            assert point[name] == pytest.approx(expected_other[name], rel=1e-9, abs=1e-9), (point, name)
    kept = rows if options.get("unfinished", "bootstrap") != "drop" else [one for one in rows if one.finished]
    assert [p["k"] for p in policy["by_k"]] == [1, 2, 4, 8, 16]
    assert [p["short"] for p in policy["by_k"]] == pytest.approx(
        [statistics.fmean(len(one.q) <= k for one in kept) for k in (1, 2, 4, 8, 16)]
    )
    assert (policy["rollouts"], policy["dropped"], policy["prompts"]) == (33, 33 - len(kept), 7)
    numbers = (policy["return_mean"], policy["return_sd"], policy["finished"], policy["length_mean"])
    means = (statistics.fmean(one.finished for one in rows), statistics.fmean(len(one.q) for one in rows))
    assert numbers == pytest.approx((expected["return_mean"], expected["return_sd"], *means), rel=1e-9)


def test_a_scores_segment_may_cut_a_prompt_and_a_prompt_may_be_in_several_segments(tmp_path: Path, rows: list[One]):
    whole = Builder(tmp_path / "whole", 6).add(rows).analyze()
    cut = Builder(tmp_path / "cut", 6).add(rows, cuts=(3, 4, 17)).analyze()
    assert cut.policies == whole.policies
    assert len(cut.segments) == 4
    halves = [[one for i, one in enumerate(rows) if i % 2 == half] for half in (0, 1)]
    spread = Builder(tmp_path / "spread", 6).add(halves[0], seed=0).add(halves[1], seed=1).analyze()
    for a, b in zip(spread.policies[0]["by_k"], whole.policies[0]["by_k"], strict=True):
        assert (a["variance"], a["bias"]) == pytest.approx((b["variance"], b["bias"]), rel=1e-12)


def test_the_share_of_covariances_between_gaps(tmp_path: Path, rows: list[One]):
    (policy,) = Builder(tmp_path, 6).add(rows).analyze().policies
    prompts = [[one for one in rows if one.prompt == p] for p in range(6)]
    gaps = [[[m - q for m, q in zip(one.max_q, one.q, strict=True)][1:] for one in prompt] for prompt in prompts]
    of_sums = sum(statistics.variance(sum(gap) for gap in prompt) for prompt in gaps)
    single = sum(
        statistics.variance(column) for prompt in gaps for column in itertools.zip_longest(*prompt, fillvalue=0)
    )
    assert policy["covariance"] == pytest.approx(1 - single / of_sums, rel=1e-5)


def test_laws_of_k_tail_and_normalisation(tmp_path: Path, rows: list[One]):
    builder = Builder(tmp_path, 6).add(rows)
    # one step is unbiased, and long jumps of Algorithm 1 are one step
    one, *longer = builder.analyze(ks=(1, 14, 1000)).policies[0]["by_k"]
    assert [(k["variance"], k["bias"]) for k in (one, *longer)] == [(one["variance"], 0)] * 3
    assert longer[1]["short"] == 1
    # normalisation changes the return, but neither variance nor bias
    raw, centred, logprob = (builder.analyze(normalization=n).policies[0] for n in ("raw", "centred", "logprob"))
    for other in (centred, logprob):
        assert abs(other["return_mean"] - raw["return_mean"]) > 1
        for a, b in zip(other["by_k"], raw["by_k"], strict=True):
            assert (a["bias"], a["variance"]) == pytest.approx((b["bias"], b["variance"]), rel=1e-9)
    # the tokens that 2K lands on are among those that K lands on; with tail one-step this is not a law
    biases = [point["bias"] for point in builder.analyze(tail="jump").policies[0]["by_k"]]
    assert biases == sorted(biases)
    assert biases[0] == 0 < biases[1]


def test_kl_is_exact_where_tokens_come_in_their_exact_shares(tmp_path: Path):
    policy, teacher = (1 / 2, 1 / 4, 1 / 4), (0.7, 0.2, 0.1)
    logsumexp = 3.0

    def token(a: int, forced: bool = False) -> One:
        q = f32(logsumexp + math.log(teacher[a]))
        largest = f32(logsumexp + math.log(0.7))
        behavior = 0.0 if forced else f32(math.log(policy[a]))
        # the second token is never drawn from the policy
        return One(0, [q, 1.0], [largest, 2.0], [logsumexp, 2.5], [0.0, 0.0], [behavior, 0.0], [forced, True], True, 0)

    (result,) = Builder(tmp_path, 1).add([token(0), token(0), token(1), token(2)]).analyze().policies
    exact = sum(p * math.log(p / t) for p, t in zip(policy, teacher, strict=True))
    assert result["kl_per_token"] == pytest.approx(exact, abs=1e-6)


def test_policies_and_ways_of_sampling_are_kept_apart(tmp_path: Path, rows: list[One]):
    builder = Builder(tmp_path, 6).add(rows[:15]).add(rows[15:], policy=OTHER).add(rows[:10], temperature=0.5)
    builder.add(rows[:6], policy=OTHER, greedy=True).add(rows[5:9], max_new_tokens=99)
    result = builder.analyze()
    assert [p["label"] for p in result.policies] == [
        f"student ({fingerprint('student')[:8]}, up to 64 tokens)",
        "other, step 40",
        "student, temperature 0.5",
        "other, step 40, greedy",
        f"student ({fingerprint('student')[:8]}, up to 99 tokens)",
    ]
    assert [p["rollouts"] for p in result.policies] == [15, 15, 10, 6, 4]
    assert result.policies[1]["by_k"][1]["bias"] == pytest.approx(literal(rows[15:], 2, normalization="raw")["bias"])
    described = ["of the sampling distribution" in text for text in str(result).split("\n\n")[1:]]
    assert described == [False, False, True, True, False]
    only = builder.analyze(policy="other")
    assert only.policies == (result.policies[1], result.policies[3])


def test_rollouts_sampled_twice_with_one_seed_count_once(tmp_path: Path, rows: list[One]):
    once = Builder(tmp_path / "once", 6).add(rows).analyze().policies[0]
    # the second run covers the first two prompts again, drawing the same rollouts
    analysis = Builder(tmp_path / "twice", 6).add(rows[:10]).add(rows, max_new_tokens=64).analyze()
    (twice,) = analysis.policies
    assert twice["repeated"] == 10
    assert twice | {"repeated": 0} == once
    assert "10 more rollouts are copies" in str(analysis)


def test_one_rollout_per_prompt_has_no_variance_and_says_so(tmp_path: Path, rows: list[One]):
    single = [replace(one, finished=True, final_max_q=0.0) for one in rows[::5]]
    result = Builder(tmp_path, 6).add(single).analyze(out=tmp_path / "out")
    (policy,) = result.policies
    assert {(p["variance"], p["variance_se"]) for p in policy["by_k"]} == {(None, None)}
    bias = statistics.fmean(literal_return(one, 2) - literal_return(one, 1) for one in single)
    assert policy["by_k"][1]["bias"] == pytest.approx(bias)
    assert "no variance: it needs 2 rollouts of a prompt" in str(result)
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["policies"][0]["by_k"][0]["variance"] is None


def test_a_policy_that_never_stops_leaves_nothing_to_use_and_says_so(tmp_path: Path, rows: list[One]):
    endless = [replace(one, finished=False, final_max_q=11.0) for one in rows]
    result = Builder(tmp_path, 6).add(endless).analyze(out=tmp_path / "out", unfinished="drop")
    (policy,) = result.policies
    assert (policy["prompts"], policy["dropped"], policy["finished"]) == (0, 30, 0)
    assert policy["return_mean"] is policy["by_k"][0]["bias"] is None is not policy["kl_per_token"]
    assert "no rollout in use" in str(result)


def test_result_is_written_as_json_and_picture(tmp_path: Path, rows: list[One]):
    builder = Builder(tmp_path / "cache", 6).add(rows, cuts=(7,))
    result = builder.analyze(out=tmp_path / "out" / "deep", ks="1,3")
    written = json.loads((tmp_path / "out" / "deep" / "analysis.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    settings = {"ks": [1, 3], "tail": "one-step", "normalization": "logprob", "unfinished": "bootstrap"}
    assert written["settings"] == settings
    assert written["segments"] == [i for i, m in open_cache(tmp_path / "cache").manifests("scores")]
    assert written["teacher"]["name"] == "teacher"
    for name in ("analysis.png", "weights.png"):
        assert (tmp_path / "out" / "deep" / name).read_bytes().startswith(b"\x89PNG")
    three = literal(rows, 3, normalization="raw")
    (line,) = [line.split() for line in str(result).splitlines() if line.split()[:1] == ["3"]]
    assert line[:5] == ["3", *(f"{three[name]:.4g}" for name in ("variance", "variance_se", "bias", "bias_se"))]


def test_what_is_not_scored_is_refused(tmp_path: Path, rows: list[One]):
    builder = Builder(tmp_path, 6)
    refuses(CacheError, "no scores yet; run `ketchup-cache score", builder.analyze)
    builder.add(rows)
    refuses(CacheError, "no policy `nobody`", builder.analyze, policy="nobody")
    ((id_, info),) = builder.cache.rollouts()
    builder.cache.commit_rollouts(builder.cache.load_rollouts(id_), info.model_copy(update={"policy": OTHER}))
    refuses(CacheError, "teacher teacher has scored no rollouts of policy other", builder.analyze, policy="other")
