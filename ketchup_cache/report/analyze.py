"""Bias and variance of K-step returns, from the cache alone (the paper's Figure 2): no model is loaded.

For each policy and each K, over the rollouts of a prompt, then averaged over prompts:
    variance    of Ĝ_1, unbiased (n − 1), as Eq. 20
    bias        mean of Ĝ_1 − G_1, as Eq. 25; a sum of gaps that were jumped over, so never negative
Normalisation cancels in both: all rollouts of a prompt start in the same state, whose baseline is one constant.
The same for the weights flat and gae. The paper's theorem on the variance takes the gaps of a rollout as uncorrelated:
    covariance  share of Var(Σ gap_t), t > 1, over a prompt's rollouts that the covariances make: 1 − Σ Var(gap_t) / it
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.console import Bar, Report, printable, progress
from ketchup_cache.errors import CacheError
from ketchup_cache.evaluation.task_metrics import spread
from ketchup_cache.files import write_file
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.provenance import Sampling
from ketchup_cache.sharing.remote_cache import open_cache

Group = list[tuple[ScoredRef, Sampling]]
"""Rollouts of one policy, sampled in one way."""
ROWS_AT_ONCE = 4096
"""Rollouts whose padded arrays are in memory together."""
TEXT = """{label}
  {prompts:,} prompts, {rollouts:,} rollouts ({dropped:,} dropped)
  sampling {sampling}, finished {finished:.1%}, mean length {length_mean:.1f} tokens
  return G_1 {mean} ± {sd} (s.d.), KL to the teacher {kl} nats per token{of_what}"""
LAMBDAS = (0.9, 0.7, 0.5)
"""Of the weights gae. Those of flat are 1/K."""
BY_K = ("k", "variance", "variance_se", "bias", "bias_se", "short")
TABLE_ROW = "  {:>10} {:>12} {:>10} {:>12} {:>10} {:>7}"


@dataclass(frozen=True)
class Analysis(Report):
    """What was asked, of which data (ids of the score segments), and a record of each policy and way of sampling from
    it. Returns are G_1 (Eq. 10) in the chosen normalisation. Errors (`_se`) are standard errors over prompts. None: too
    few rollouts or prompts.

    Keys of a record, beside `label`, `policy` and `sampling`:
    prompts: with at least one rollout in use. prompts_with_variance: with at least two.
    rollouts: all that count. repeated: copies that do not: same policy, prompt and seed, sampled a second time.
    dropped: rollouts not in use, because they were cut at the length limit (`unfinished="drop"`) or are empty.
    finished, length_mean: over all rollouts, dropped ones too. return_mean, return_sd: over all rollouts in use.
    kl_per_token: KL(μ‖teacher) in nats, estimated by the mean of log μ(a_t|s_t) − log p_teacher(a_t|s_t) over the
        tokens that were drawn from μ. Its expectation is exact. μ is the policy itself where `sampling` is "plain".
    covariance: see above; None where no gap varies.
    by_weights: the same figures, but `short`, for the weights flat and gae, with their `weights` and `lam`.
    by_k: for each K its `k`, `variance`, `variance_se`, `bias`, `bias_se`, and `short`: share of rollouts of at most K
        tokens, too short for a jump inside them. With tail "one-step" their Ĝ_1 is G_1, so variance can rise again,
        and bias fall, where K reaches the length of the completions.
    """

    cache: str
    settings: dict[str, Any]
    teacher: dict[str, Any]
    segments: tuple[str, ...]
    policies: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        head = "teacher {}; normalization {normalization}, tail {tail}, unfinished {unfinished}"
        return "\n\n".join([head.format(printable(self.teacher["name"]), **self.settings), *map(_text, self.policies)])


def analyze(config: AnalyzeConfig) -> Analysis:
    """Analyse each policy in the cache, or the chosen one; write analysis.json and pictures where `out` is given.

    Memory grows with the number of rollouts (a few numbers each), not with their tokens.

    Raises CacheError where nothing in the cache is scored or fits the request, WriteError for `out`.
    """
    cache = open_cache(config.cache)
    teacher = cache.select_teacher(config.scored_by)
    teacher.require_known(config.normalization, config.unfinished)
    refs = cache.scored(teacher.fingerprint, config.policy)
    if not refs:
        what = f"{config.cache}: teacher {teacher.name} has scored no rollouts of policy {config.policy}"
        raise CacheError(f"{what}; run `ketchup-cache score --cache {config.cache}` first")
    groups: dict[tuple[str, str, int], Group] = {}
    infos = dict(cache.rollouts())
    for ref in refs:
        sampling = infos[ref.rollouts_id].sampling
        key = ref.policy.fingerprint, _describe(sampling), sampling.max_new_tokens
        groups.setdefault(key, []).append((ref, sampling))
    with progress("analyze", sum(ref.rows for ref in refs), "rollouts") as bar:
        policies = [_analyze_policy(cache, of_one, config, bar) for of_one in groups.values()]
    labels = [policy["label"] for policy in policies]
    for policy, label, (fingerprint, _, longest) in zip(policies, labels, groups, strict=True):
        if labels.count(label) > 1:
            policy["label"] = f"{label} ({fingerprint[:8]}, up to {longest} tokens)"
    settings = config.model_dump(mode="json", include={"ks", "tail", "normalization", "unfinished"})
    segments = tuple(dict.fromkeys(ref.scores_id for ref in refs))
    analysis = Analysis(str(config.cache), settings, teacher.model_dump(mode="json"), segments, tuple(policies))
    if config.out:
        from ketchup_cache.report.plots import variance_bias_figure, weights_figure, write_png  # slow to import

        content = json.dumps(analysis.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_file(config.out / "analysis.json", content.encode())
        write_png(variance_bias_figure(analysis.to_dict()), config.out / "analysis.png")
        write_png(weights_figure(analysis.to_dict()), config.out / "weights.png")
    return analysis


def _analyze_policy(cache: Cache, group: Group, config: AnalyzeConfig, bar: Bar) -> dict[str, Any]:
    """The label is its name, step and way of sampling."""
    options: Any = config.model_dump(include={"tail", "normalization", "unfinished"})
    totals = np.zeros(6)
    used: list[tuple[NDArray, NDArray, NDArray]] = []
    gaps: list[NDArray] = []
    others = [{"weights": "flat", "lam": 1 / k} for k in config.ks] + [{"weights": "gae", "lam": x} for x in LAMBDAS]
    sources: dict[tuple[int, bytes], str] = {}
    for ref, way in group:
        scored = cache.load_scored(ref)
        rollouts, scores, lengths = scored.rollouts, scored.scores, scored.rollouts.completions.lengths
        # S16 cuts zeros at the end, but all ids have 16 bytes, so different ones stay different
        ids = np.ascontiguousarray(scored.prompts.ids[rollouts.prompt_index]).view("S16")[:, 0]
        # one seed draws the same rollouts again: a prompt's second segment of that seed is no new evidence
        first = {i: sources.setdefault((way.seed, i), ref.rollouts_id) for i in set(ids.tolist())}
        new = np.array([first[i] == ref.rollouts_id for i in ids.tolist()])
        drawn = np.repeat(new, lengths) & ~rollouts.forced
        log_ratio = rollouts.behavior_logprob.astype(np.float64) - (scores.q.astype(np.float64) - scores.logsumexp)
        counted = (new, ~new, rollouts.finished[new], lengths[new], drawn, log_ratio[drawn])
        totals += [values.sum() for values in counted]
        rows = np.flatnonzero(new & (rollouts.finished | (config.unfinished != "drop")) & (lengths > 0))
        for part in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
            taken = scored.take(part)
            returns = rollout_returns(taken.rollouts, taken.scores, (1, *config.ks, *others), **options)
            gap = (taken.scores.max_q - taken.scores.q.astype(np.float64)).astype(np.float32)
            gaps.append(taken.rollouts.completions.with_values(gap).padded()[:, 1:])
            used.append((ids[part], lengths[part], np.stack([g[:, :1].ravel() for g in returns], axis=1)))
        bar.advance(ref.rows)
    count, repeated, finished, tokens, drawn_count, log_ratio_sum = totals.tolist()
    ids, lengths, first_returns = map(np.concatenate, zip(*used, strict=True))
    one_step, k_step = first_returns[:, 0], first_returns[:, 1:]
    _, prompt, counts = np.unique(ids, return_inverse=True, return_counts=True)
    several, sums = counts > 1, np.zeros((3, len(counts), k_step.shape[1]))
    np.add.at(sums[0], prompt, k_step)
    np.add.at(sums[1], prompt, (k_step - (sums[0] / counts[:, None])[prompt]) ** 2)
    np.add.at(sums[2], prompt, k_step - one_step[:, None])
    variance, bias = sums[1, several] / (counts[several, None] - 1), sums[2] / counts[:, None]
    figures = [
        dict(zip(BY_K[1:5], (number for values in of_prompts for number in spread(values)[::2]), strict=True))
        for of_prompts in zip(variance.T, bias.T, strict=True)
    ]
    of_k = zip(config.ks, figures, strict=False)
    by_k = [{"k": k, **figure, "short": spread(lengths <= k)[0]} for k, figure in of_k]
    by_weights = [other | figure for other, figure in zip(others, figures[len(by_k) :], strict=True)]
    return_mean, return_sd, _ = spread(one_step)
    policy, sampling = group[0][0].policy, _describe(group[0][1])
    step = [] if policy.step is None else [f"step {policy.step}"]
    return {
        "label": ", ".join([policy.name, *step, *([] if sampling == "plain" else [sampling])]),
        "policy": policy.model_dump(mode="json"), "sampling": sampling,
        "prompts": len(counts), "prompts_with_variance": int(several.sum()),
        "rollouts": int(count), "repeated": int(repeated), "dropped": int(count) - len(ids),
        "finished": finished / count, "length_mean": tokens / count,
        "return_mean": return_mean, "return_sd": return_sd,
        "kl_per_token": log_ratio_sum / drawn_count if drawn_count else None,
        "covariance": _covariance(gaps, prompt, counts), "by_k": by_k, "by_weights": by_weights,
    }  # fmt: skip


def _covariance(gaps: list[NDArray], prompt: NDArray, counts: NDArray) -> float | None:
    """gaps: of the rollouts in parts, [b, T] with zeros past the end. prompt: [B], whose they are. counts: of each."""
    width = max((part.shape[1] for part in gaps), default=0)
    values = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in gaps] or [np.zeros((0, 0))])
    values = np.column_stack([values, values.sum(1)]).astype(np.float64)
    means = np.zeros((len(counts), width + 1))
    np.add.at(means, prompt, values / counts[prompt, None])
    weight = 1 / np.maximum(counts - 1, 1) * (counts > 1)
    variance = (weight[prompt, None] * (values - means[prompt]) ** 2).sum(0)
    return float(1 - variance[:-1].sum() / variance[-1]) if variance[-1] else None


def _text(policy: dict[str, Any]) -> str:
    mean, sd, kl = (_number(policy[name]) for name in ("return_mean", "return_sd", "kl_per_token"))
    of_what = "" if policy["sampling"] == "plain" else " (of the sampling distribution)"
    head = TABLE_ROW.format("K", "variance", "± s.e.", "bias", "± s.e.", "T ≤ K")
    shown = policy | {"label": printable(policy["label"])}
    lines = [TEXT.format(**shown, mean=mean, sd=sd, kl=kl, of_what=of_what), head]
    for point in policy["by_k"]:
        k, *numbers, short = (point[name] for name in BY_K)
        lines.append(TABLE_ROW.format(k, *map(_number, numbers), "–" if short is None else f"{short:.0%}"))
    for other in policy["by_weights"]:
        name = f"{other['weights']} {other['lam']:.3g}"
        lines.append(TABLE_ROW.format(name, *(_number(other[key]) for key in BY_K[1:5]), ""))
    if policy["covariance"] is not None:
        lines.append(f"  covariances make {policy['covariance']:.0%} of the variance of the sum of a rollout's gaps")
    if not policy["prompts"]:
        lines.append("  no rollout in use: all were cut at the length limit; see --unfinished")
    elif not policy["prompts_with_variance"]:
        lines.append("  no variance: it needs 2 rollouts of a prompt; sample with --samples 2 or more")
    if policy["repeated"]:
        lines.append(f"  {policy['repeated']:,} more rollouts are copies (sampled twice with one seed), left out")
    return "\n".join(lines)


def _describe(sampling: Sampling) -> str:
    """How tokens were drawn, in words; "plain" is the policy's full softmax at temperature 1."""
    if sampling.greedy:
        return "greedy"
    options = (("temperature", sampling.temperature, 1), ("top-k", sampling.top_k, 0), ("top-p", sampling.top_p, 1))
    return ", ".join(f"{name} {value:g}" for name, value, off in options if value != off) or "plain"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
