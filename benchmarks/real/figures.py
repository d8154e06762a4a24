"""The paper's three figures on real text, from the results: return by method, bias and variance, learning curves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.real.choices import Records, comparisons, labels, runs
from benchmarks.real.settings import BATCH
from ketchup_cache.report.plots import COLOURS, DASHES, FIGURE, MARKERS, variance_bias_figure, weights_figure


def figures(done: Records) -> Iterator[tuple[str, Figure]]:
    """Those that the results are enough for, by name."""
    found = {name: record for name, record in done.items() if name.startswith("variance/")}
    if found:
        policies = [
            {"label": f"start {name.split('/')[1]}", "kl_per_token": None, **record} for name, record in found.items()
        ]
        yield "figure-2", variance_bias_figure({"policies": policies})
        yield "figure-2-weights", weights_figure({"policies": policies})
    if "chosen" in done and runs(done, "start"):
        yield "figure-1", returns(done)
        yield "figure-3", curves(done)


def returns(done: Records) -> Figure:
    """Figure 1: mean return of greedy outputs on the test split, best and last checkpoints of each row, and BLEU."""
    known = [label for label in labels(done) if " every " not in label and "by ess" not in label]
    figure = Figure((9, 0.6 + 0.24 * len(known)), **FIGURE)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, of) in zip(panels, {"mean return": "return", "BLEU": "bleu"}.items(), strict=True):
        for place, label in enumerate(known):
            values = [run["test"][of] for run in runs(done, label)]
            axes.plot(values, [place] * len(values), "o", color=COLOURS[0], alpha=0.35, markersize=4, linestyle="none")
            axes.plot([np.mean(values)], [place], "|", color=COLOURS[3], markersize=12, markeredgewidth=2)
            if of == "bleu" and (last := [run["last"]["bleu"] for run in runs(done, label) if "last" in run]):
                axes.plot([np.mean(last)], [place], "x", color=COLOURS[2], markersize=5)
        axes.set(title=f"{title}, test split", yticks=range(len(known)), yticklabels=known)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.supxlabel("o: a start   |: mean   ×: mean of the last checkpoints", fontsize="small")
    return figure


def curves(done: Records) -> Figure:
    """Figure 3: BLEU and length on the dev set against completions trained on: the compared rows, mean over starts."""
    rows = [row for row in dict.fromkeys(row for pair in comparisons(done) for row in pair) if row != "start"]
    figure = Figure((9, 3.8), **FIGURE)
    panels = figure.subplots(1, 2)
    for place, row in enumerate(rows):
        found = [run["learn"]["curve"] for run in runs(done, row)]
        steps = min((len(curve) for curve in found), default=0)
        style: Any = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place], "markersize": 4}
        style["linestyle"] = DASHES[place % len(DASHES)]
        for axes, of in zip(panels, ("bleu", "length_mean"), strict=True):
            mean = [[np.mean([curve[i][name] for curve in found]) for i in range(steps)] for name in ("step", of)]
            axes.plot(np.array(mean[0]) * BATCH / 1000, mean[1], label=row, **style)
    for axes, title in zip(panels, ("BLEU on the dev set", "length of the outputs, tokens"), strict=True):
        axes.set(title=title, xlabel="thousand completions trained on")
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
