"""What is chosen on the dev set, and what is tested on the test split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real.place import Place
from benchmarks.real.settings import (
    COMPARED,
    DEV_SEEDS,
    FEWER,
    FRESH,
    GROUPS,
    MARGIN,
    OTHER_SEEDS,
    RATES,
    ROWS_ALIKE,
    SEEDS,
    SEQKD_RATES,
    Row,
    row_of,
    rows,
)

Records = Mapping[str, Any]
SEQKD = (
    "SeqKD continued",
    "SeqKD, new outputs",
    "SeqKD, new outputs, longer",
    *(f"SeqKD, {outputs:,} new outputs" for outputs in FEWER),
)
"""Rows that go on with pre-distillation."""


def best(record: Records, metric: str = "bleu") -> float:
    """Of a run, at the evaluation on the dev set that was kept."""
    return [line[metric] for line in record["curve"] if line["best"]][-1]


def grid_name(lr: float) -> str:
    return f"grid/{lr:g}"


def inherited(done: Records) -> dict[str, Any]:
    """For a task that is like the one with the records `done`: its settings, the rate of pre-distillation, and how many
    new outputs SeqKD has."""
    return {"chosen": done["chosen"], "rate": best_rate(done), "affordable": affordable(done)}


def best_rate(done: Records) -> float:
    """Of pre-distillation."""
    if "inherited" in done:
        return done["inherited"]["rate"]
    return max(RATES, key=lambda lr: best(done[grid_name(lr)]))


def gain_of_doubling(done: Records) -> list[float]:
    """Dev BLEU that twice the epochs add to each start that they were tried on."""
    seeds = [name.split("/")[1] for name in done if name.startswith("doubled/")]
    return [best(done[f"doubled/{seed}"]) - best(done[f"starts/{seed}"]) for seed in seeds]


def chosen_of(done: Records, group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The setting with the highest mean dev BLEU over the starts that settings are chosen on."""
    mean = {k: np.mean([best(done[f"dev/{group}/{k}/{s}"]["learn"]) for s in DEV_SEEDS]) for k in settings}
    label = max(mean, key=lambda k: mean[k])
    return {"label": label, "dev_bleu": float(mean[label]), "options": dict(settings[label])}


def chosen(done: Records) -> dict[str, Any]:
    """Of each group, of SeqKD on new outputs, and, by `rows`, of each row of the groups."""
    found = {group: chosen_of(done, group, settings) for group, settings in GROUPS.items()}
    found["seqkd"] = chosen_of(done, "seqkd", {f"{lr:g}": {"lr": lr} for lr in SEQKD_RATES})
    rows = {}
    for group, settings in GROUPS.items():
        for row in dict.fromkeys(map(row_of, settings)):
            tried = {label: options for label, options in settings.items() if row_of(label) == row}
            rows[row] = chosen_of(done, group, tried)["options"]
    return found | {"rows": rows}


def affordable(done: Records) -> int:
    """Teacher outputs that cost as many teacher seconds as the scoring did in the paper's best row, on average."""
    if "inherited" in done:
        return done["inherited"]["affordable"]
    label = chosen_of(done, "paper", GROUPS["paper"])["label"]
    scoring = [done[f"dev/paper/{label}/{seed}"]["learn"]["score_s"] for seed in DEV_SEEDS]
    made = done["outputs"]["rollout"]
    return round(float(np.mean(scoring)) * made["rollouts"] / made["seconds"])


def table_rows(done: Records) -> dict[str, Row]:
    return rows(done["chosen"]["rows"], {group: winner(done, group) for group in GROUPS})


def winner(done: Records, group: str) -> str:
    """The row that a group's winner is; a row's own name stays."""
    return row_of(done["chosen"][group]["label"]) if group in GROUPS else group


def best_gradient(done: Records) -> str:
    """The row of the policy gradient that is best on the dev set."""
    return winner(done, max(("llmr", "paper", "new"), key=lambda group: done["chosen"][group]["dev_bleu"]))


def comparisons(done: Records) -> list[tuple[str, str]]:
    """Pairs of rows: the three that are tested together, then the best policy gradient against reverse KL, and the best
    new row against the paper's, which describes."""
    new, paper = winner(done, "new"), winner(done, "paper")
    pairs = [(winner(done, one), winner(done, other)) for one, other in COMPARED]
    return [*pairs, (best_gradient(done), FRESH), (new, paper)]


def seeds_by_row(done: Records, labels: Iterable[str]) -> dict[str, Sequence[int]]:
    """The compared rows come first. A task that is like another has few others."""
    compared = {row for pair in comparisons(done) for row in pair}
    if "inherited" in done:
        labels = [label for label in labels if label in {*compared, *ROWS_ALIKE}]
    found = {label: SEEDS if label in compared else OTHER_SEEDS for label in labels}
    return dict(sorted(found.items(), key=lambda item: item[1] != SEEDS))


def runs(done: Records, label: str) -> list[dict[str, Any]]:
    """Of a row, by start."""
    names = (name.rsplit("/", 1) for name in done)
    return [done[f"{row}/{seed}"] for row, seed in sorted(n for n in names if len(n) == 2) if row == f"run/{label}"]


def labels(done: Records) -> list[str]:
    return [label for label in ("start", *SEQKD, *table_rows(done)) if runs(done, label)]


# ----------------------------------------------------------------------------------------------------------- tests


def bootstrap(place: Place, one: str, other: str, samples: int = 1000) -> dict[str, Any]:
    """BLEU of one row less that of the other on the test split, starts and sentences drawn anew together, in pairs.

    p: twice the smaller share of differences on one side of zero. low_95: the lower end of a one-sided interval.
    """
    from sacrebleu.metrics.bleu import BLEU

    def statistics(row: str, seed: int) -> NDArray:
        folder = f"starts/{seed}" if row == "start" else f"run/{row}/{seed}"
        lines = (place / f"{folder}/test-outputs.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        bleu = BLEU()
        refs = [[pair["target"] for pair in pairs]]
        return np.array(bleu._extract_corpus_statistics([pair["output"] for pair in pairs], refs))

    stats = np.stack([[statistics(row, seed) for seed in SEEDS] for row in (one, other)])
    rng, found = np.random.default_rng(0), []
    for sample in range(samples + 1):
        starts = rng.integers(len(SEEDS), size=len(SEEDS)) if sample else np.arange(len(SEEDS))
        sentences = rng.integers(stats.shape[2], size=stats.shape[2]) if sample else np.arange(stats.shape[2])
        drawn = stats[:, starts][:, :, sentences].sum(2)
        scores = [[BLEU()._compute_score_from_stats(list(map(int, row))).score for row in side] for side in drawn]
        found.append(float(np.mean(scores[0]) - np.mean(scores[1])))
    whole, resampled = found[0], np.array(found[1:])
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = min(1.0, max(1 / samples, 2 * min((resampled <= 0).mean(), (resampled >= 0).mean())))
    result = {"one": one, "other": other, "difference": whole, "low": float(low), "high": float(high), "p": float(p)}
    return result | {"low_95": float(np.quantile(resampled, 0.05)), "margin": MARGIN}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: each p-value as it counts among all of them."""
    order, corrected, highest = np.argsort(p), np.empty(len(p)), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = highest
    return corrected.tolist()


def cost_to_reach(done: Records, new: str, old: str, samples: int = 1000) -> dict[str, float | None]:
    """Tokens until `new` has the best dev BLEU of `old` and keeps it, over those until `old` has it: mean over starts.

    Tokens: those that the student was trained on, and those that the teacher scored by then (of all, as many as the
    share of steps). None: some start never gets there. high: the upper end of a 95 % interval, starts drawn anew.
    """

    def curve(run: Mapping[str, Any]) -> list[dict[str, Any]]:
        lines = run["learn"]["curve"]
        steps = lines[-1]["step"]
        return [{**line, "tokens": line["tokens"] + run["scored"] * line["step"] / steps} for line in lines]

    ratios = []
    for seed in SEEDS:
        curves = {row: curve(done[f"run/{row}/{seed}"]) for row in (new, old)}
        goal = max(curves[old], key=lambda line: line["bleu"])
        below = [place for place, line in enumerate(curves[new]) if line["bleu"] < goal["bleu"]]
        first = below[-1] + 1 if below else 0
        if first == len(curves[new]) or not goal["tokens"]:
            return {"ratio": None, "high": None}
        ratios.append(curves[new][first]["tokens"] / goal["tokens"])
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(ratios, len(ratios))) for _ in range(samples)]
    return {"ratio": float(np.mean(ratios)), "high": float(np.quantile(means, 0.975))}
