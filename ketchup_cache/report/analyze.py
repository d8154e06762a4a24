"""Bias and variance of K-step returns, from the cache alone (the paper's Figure 2): no model is loaded.

For each policy and each K, over the rollouts of a prompt, then averaged over prompts:
    variance    of Ĝ_1, unbiased (n − 1), as Eq. 20
    bias        mean of Ĝ_1 − G_1, as Eq. 25; a sum of gaps that were jumped over, so never negative
Normalisation cancels in both: all rollouts of a prompt start in the same state, whose baseline is one constant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.console import progress
from ketchup_cache.errors import CacheError
from ketchup_cache.files import write_file
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.provenance import PolicyInfo, Sampling
from ketchup_cache.report.suggest import Suggestion, suggest_k
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import ScoredRollouts

ROWS_AT_ONCE = 4096
"""Rollouts whose padded arrays are in memory together."""


@dataclass(frozen=True)
class KAnalysis:
    """One K of one policy. Errors are standard errors over prompts; None where there are too few of them.

    short: share of rollouts of at most K tokens, too short for a jump inside them. With tail "one-step" their Ĝ_1
    is G_1: variance can rise again, and bias fall, where K reaches the length of the completions.
    """

    k: int
    variance: float | None
    variance_se: float | None
    bias: float | None
    bias_se: float | None
    short: float | None


@dataclass(frozen=True)
class PolicyAnalysis:
    """One policy (and one way of sampling from it). Returns are G_1 (Eq. 10) in the chosen normalisation.

    prompts: with at least one rollout in use. prompts_with_variance: with at least two.
    rollouts: all that count. repeated: copies that do not: same policy, prompt and seed, sampled a second time.
    dropped: rollouts not in use, because they were cut at the length limit (`unfinished="drop"`) or are empty.
    finished, length_mean: over all rollouts, dropped ones too. return_sd: over all rollouts in use, of all prompts.
    kl_per_token: KL(μ‖teacher) in nats, estimated by the mean of log μ(a_t|s_t) − log p_teacher(a_t|s_t) over the
        tokens that were drawn from μ. Its expectation is exact; μ is the policy itself where `sampling` is plain.
    """

    label: str
    policy: dict[str, Any]
    sampling: str
    prompts: int
    prompts_with_variance: int
    rollouts: int
    repeated: int
    dropped: int
    finished: float
    length_mean: float
    return_mean: float | None
    return_sd: float | None
    kl_per_token: float | None
    by_k: tuple[KAnalysis, ...]
    suggestion: Suggestion

    def __str__(self) -> str:
        head = [
            self.label,
            f"  {self.prompts:,} prompts, {self.rollouts:,} rollouts ({self.dropped:,} dropped)",
            f"  sampling {self.sampling}, finished {self.finished:.1%}, mean length {self.length_mean:.1f} tokens",
            f"  return G_1 {_number(self.return_mean)} ± {_number(self.return_sd)} (s.d.), "
            f"KL to the teacher {_number(self.kl_per_token)} nats per token"
            + ("" if self.sampling == "plain" else " (of the sampling distribution)"),
            f"  {'K':>4} {'variance':>12} {'± s.e.':>10} {'bias':>12} {'± s.e.':>10} {'T ≤ K':>7}",
        ]
        rows = [
            f"  {p.k:>4} {_number(p.variance):>12} {_number(p.variance_se):>10}"
            f" {_number(p.bias):>12} {_number(p.bias_se):>10} {'–' if p.short is None else f'{p.short:.0%}':>7}"
            for p in self.by_k
        ]
        notes = []
        if not self.prompts:
            notes.append("  no rollout in use: all were cut at the length limit; see --unfinished")
        elif not self.prompts_with_variance:
            notes.append("  no variance: it needs 2 rollouts of a prompt; sample with --samples 2 or more")
        if self.repeated:
            notes.append(
                f"  {self.repeated:,} more rollouts are copies (sampled twice with one seed) and were left out"
            )
        suggested = self.suggestion
        notes.append(f"  suggested K: {'none' if suggested.k is None else suggested.k}; {suggested.reason}")
        if suggested.k is not None:
            best = ", ".join(f"{k} for {m}" for m, k in zip(suggested.averaged, suggested.best, strict=True))
            notes.append(f"  best K by the rollouts averaged for each decision: {best} (docs/method.md)")
        return "\n".join(head + rows + notes)


@dataclass(frozen=True)
class Analysis:
    """What was asked, of which data (ids of the score segments), and a result for each policy."""

    cache: str
    settings: dict[str, Any]
    teacher: dict[str, Any]
    segments: tuple[str, ...]
    policies: tuple[PolicyAnalysis, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        options = ", ".join(f"{key} {self.settings[key]}" for key in ("normalization", "tail", "unfinished"))
        head = f"teacher {self.teacher['name']}; {options}"
        return "\n\n".join([head, *map(str, self.policies)])


def analyze(config: AnalyzeConfig) -> Analysis:
    """Analyse each policy in the cache, or the chosen one; write analysis.json and analysis.png where `out` is given.

    Memory grows with the number of rollouts (a few numbers each), not with their tokens.

    Raises CacheError where nothing in the cache is scored or fits the request, WriteError for `out`.
    """
    cache = open_cache(config.cache)
    teacher = cache.select_teacher(config.scored_by)
    refs = cache.scored(teacher.fingerprint, config.policy)
    if not refs:
        raise CacheError(
            f"{config.cache}: teacher {teacher.name} has scored no rollouts of policy {config.policy}; "
            f"run `ketchup-cache score --cache {config.cache}` first"
        )
    groups: dict[tuple[str, str, int], _Group] = {}
    source: dict[tuple[_Group, int, bytes], str] = {}
    with progress("analyze", sum(ref.rows for ref in refs), "rollouts") as bar:
        for ref in refs:
            info = cache.manifest(ref.rollouts_id).info
            assert isinstance(info, RolloutsInfo)
            sampling = _describe(info.sampling)
            key = (ref.policy.fingerprint, sampling, info.sampling.max_new_tokens)
            group = groups.setdefault(key, _Group(ref.policy, sampling, config))
            scored = cache.load_scored(ref)
            ids = _prompt_ids(scored)
            # one seed draws the same rollouts again: a prompt's second segment of that seed is no new evidence
            first = {i: source.setdefault((group, info.sampling.seed, i), ref.rollouts_id) for i in set(ids.tolist())}
            group.add(scored, np.array([first[i] == ref.rollouts_id for i in ids.tolist()]))
            bar.advance(ref.rows)
    analysis = Analysis(
        cache=str(config.cache),
        settings=config.model_dump(mode="json", include={"ks", "tail", "normalization", "unfinished"}),
        teacher=teacher.model_dump(mode="json"),
        segments=tuple(dict.fromkeys(ref.scores_id for ref in refs)),
        policies=tuple(map(_Group.result, groups.values(), _labels(groups))),
    )
    if config.out:
        from ketchup_cache.report.plots import plot_variance_bias  # slow to import

        content = json.dumps(analysis.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_file(config.out / "analysis.json", content.encode())
        plot_variance_bias(analysis.to_dict(), config.out / "analysis.png")
    return analysis


# ------------------------------------------------------------------------------------------------- one policy


class _Group:
    """What is kept of the rollouts of one policy while segments pass by."""

    def __init__(self, policy: PolicyInfo, sampling: str, config: AnalyzeConfig) -> None:
        self.policy, self.sampling, self.config = policy, sampling, config
        self.prompt_ids: list[NDArray[np.bytes_]] = []
        self.first_tokens: list[NDArray[np.int64]] = []
        self.returns: list[NDArray[np.float64]] = []
        self.lengths: list[NDArray[np.int64]] = []
        self.rollouts = self.repeated = self.finished = self.tokens = self.drawn = 0
        self.log_ratio = 0.0

    def add(self, scored: ScoredRollouts, new: NDArray[np.bool_]) -> None:
        """new: [B] bool, the rows to count."""
        rollouts, scores = scored.rollouts, scored.scores
        lengths = rollouts.completions.lengths
        self.rollouts += int(new.sum())
        self.repeated += int((~new).sum())
        self.finished += int(rollouts.finished[new].sum())
        self.tokens += int(lengths[new].sum())

        drawn = np.repeat(new, lengths) & ~rollouts.forced
        log_ratio = rollouts.behavior_logprob.astype(np.float64) - (scores.q.astype(np.float64) - scores.logsumexp)
        self.log_ratio += float(log_ratio[drawn].sum())
        self.drawn += int(drawn.sum())

        kept = rollouts.finished | (self.config.unfinished != "drop")
        used = np.flatnonzero(new & kept & (lengths > 0))
        self.prompt_ids.append(_prompt_ids(scored)[used])
        self.lengths.append(lengths[used])
        completions = rollouts.completions
        self.first_tokens.append(completions.values[completions.offsets[used]].astype(np.int64))
        for start in range(0, len(used), ROWS_AT_ONCE):
            self.returns.append(_first_returns(scored, used[start : start + ROWS_AT_ONCE], self.config))

    def result(self, label: str) -> PolicyAnalysis:
        returns = np.concatenate([np.empty((0, 1 + len(self.config.ks))), *self.returns])
        lengths = np.concatenate(self.lengths)
        _, prompt, counts = np.unique(np.concatenate(self.prompt_ids), return_inverse=True, return_counts=True)
        one_step, k_step = returns[:, 0], returns[:, 1:]

        def prompt_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
            """[rollouts, K] → [prompts, K]."""
            sums = np.zeros((len(counts), values.shape[1]))
            np.add.at(sums, prompt, values)
            return sums

        several = counts > 1
        deviations = k_step - (prompt_sums(k_step) / counts[:, None])[prompt]
        variance = prompt_sums(deviations**2)[several] / (counts[several, None] - 1)
        bias = prompt_sums(k_step - one_step[:, None]) / counts[:, None]
        return PolicyAnalysis(
            label=label,
            policy=self.policy.model_dump(mode="json"),
            sampling=self.sampling,
            prompts=len(counts),
            prompts_with_variance=int(several.sum()),
            rollouts=self.rollouts,
            repeated=self.repeated,
            dropped=self.rollouts - len(returns),
            finished=self.finished / self.rollouts,
            length_mean=self.tokens / self.rollouts,
            return_mean=_mean(one_step),
            return_sd=float(one_step.std(ddof=1)) if len(one_step) > 1 else None,
            kl_per_token=self.log_ratio / self.drawn if self.drawn else None,
            by_k=tuple(
                KAnalysis(
                    k,
                    _mean(variance[:, i]),
                    _standard_error(variance[:, i]),
                    _mean(bias[:, i]),
                    _standard_error(bias[:, i]),
                    _mean(lengths <= k),
                )
                for i, k in enumerate(self.config.ks)
            ),
            suggestion=suggest_k(prompt, np.concatenate(self.first_tokens), one_step, k_step, self.config.ks),
        )


def _first_returns(scored: ScoredRollouts, rows: NDArray[np.int64], config: AnalyzeConfig) -> NDArray[np.float64]:
    """[rows, 1 + ks]: G_1, then Ĝ_1 for each K."""
    taken = scored.take(rows)
    returns = rollout_returns(
        taken.rollouts,
        taken.scores,
        (1, *config.ks),
        tail=config.tail,
        normalization=config.normalization,
        unfinished=config.unfinished,
    )
    return np.stack([of_k[:, 0] for of_k in returns], axis=1)


def _prompt_ids(scored: ScoredRollouts) -> NDArray[np.bytes_]:
    """[B] S16. That type cuts zeros at the end, but all ids have 16 bytes, so different ones stay different."""
    return np.ascontiguousarray(scored.prompts.ids[scored.rollouts.prompt_index]).view("S16")[:, 0]


def _labels(groups: Mapping[tuple[str, str, int], _Group]) -> list[str]:
    """Name, step and way of sampling, and more where these don't tell two groups apart."""
    labels = [
        group.policy.name
        + ("" if group.policy.step is None else f", step {group.policy.step}")
        + ("" if group.sampling == "plain" else f", {group.sampling}")
        for group in groups.values()
    ]
    return [
        f"{label} ({fingerprint[:8]}, up to {longest} tokens)" if labels.count(label) > 1 else label
        for label, (fingerprint, _, longest) in zip(labels, groups, strict=True)
    ]


def _mean(values: NDArray) -> float | None:
    return float(values.mean()) if len(values) else None


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _describe(sampling: Sampling) -> str:
    """How tokens were drawn, in words; "plain" is the policy's full softmax at temperature 1."""
    if sampling.greedy:
        return "greedy"
    parts = [
        f"{name} {value:g}"
        for name, value, off in (
            ("temperature", sampling.temperature, 1),
            ("top-k", sampling.top_k, 0),
            ("top-p", sampling.top_p, 1),
        )
        if value != off
    ]
    return ", ".join(parts) or "plain"
