"""Figures 1 to 3 as PNG, from the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.paper.settings import FIGURE_3_KS, FIGURE_3_TASK, TABLE, TASKS
from benchmarks.paper.statistics import Mean
from benchmarks.paper.tables import RETURN, Record, by_seed
from ketchup_cache.report.plots import COLOURS, DASHES, MARKERS, variance_bias_figure

WINDOW = 5


def figure_1(records: Iterable[Record], path: Path) -> None:
    """Mean return of greedy outputs on the test split, by method: a panel for each task."""
    returns_by_method(records).savefig(path, format="png")


def returns_by_method(records: Iterable[Record]) -> Figure:
    records = list(records)
    tasks = [t for t in TASKS.values() if any(by_seed(records, t.name, row.name, RETURN) for row in TABLE)]
    figure = _figure(1.5 + 3.6 * len(tasks), 4.6)
    # the panels share their labels: a row that one task lacks has an empty place there
    shown = [row.name for row in TABLE if any(by_seed(records, task.name, row.name, RETURN) for task in tasks)]
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        names = [name for name in shown if by_seed(records, task.name, name, RETURN)]
        means = [Mean.of(list(by_seed(records, task.name, name, RETURN).values())) for name in names]
        places = np.array([len(shown) - 1 - shown.index(name) for name in names])
        colours = [
            COLOURS[2] if n.startswith(("KETCHUP", "K =")) else COLOURS[1] if n.startswith("LLMR") else "0.6"
            for n in names
        ]
        axes.errorbar(
            [m.mean for m in means], places, xerr=[m.se or 0 for m in means], fmt="none", ecolor="0.3", capsize=3
        )
        axes.scatter([m.mean for m in means], places, c=colours, s=40, zorder=3)
        if before := list(by_seed(records, task.name, "predistilled", RETURN).values()):
            axes.axvline(before[0], color="0.3", linestyle=":", linewidth=1)
            axes.annotate(
                "before", (before[0], 1), (3, -9), ("data", "axes fraction"), "offset points", fontsize="small"
            )
        axes.set_yticks(np.arange(len(shown))[::-1], shown if axes is figure.axes[0] else [""] * len(shown))
        axes.set_ylim(-0.6, len(shown) - 0.1)
        axes.set_title(task.name)
        axes.set_xlabel("mean return G₁ on the test split (nats)\n± standard error over seeds")
        axes.grid(axis="x", alpha=0.3)
    return figure


def figure_2(analysis: dict[str, Any], path: Path) -> None:
    """Variance and bias against K for students at several distances from the teacher: what `analyze` reports."""
    variance_bias_figure(analysis).savefig(path, format="png")


def figure_3(records: Sequence[Record], path: Path, task: str = FIGURE_3_TASK) -> None:
    """Learning curves by K (lines) and student size (panels): mean and standard error over seeds."""
    sizes = [
        name for name in ("small", "predistilled", "large") if any(_curves(records, task, name, k) for k in FIGURE_3_KS)
    ]
    figure = _figure(1.5 + 3.8 * len(sizes), 4.2)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for i, k in enumerate(FIGURE_3_KS):
            curves = _curves(records, task, size, k)
            if not curves:
                continue
            values = np.array([running_mean(np.array(curve), WINDOW) for curve in curves])
            mean, steps = values.mean(0), np.arange(values.shape[1])
            half = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
            style = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 4}
            axes.plot(
                steps,
                mean,
                label=f"K = {k}" + (" (LLMR)" if k == 1 else ""),
                markevery=max(len(steps) // 8, 1),
                **style,
            )
            axes.fill_between(steps, mean - half, mean + half, color=COLOURS[i], alpha=0.15, linewidth=0)
        axes.set_title({"predistilled": "shipped student"}.get(size, f"{size} student"))
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(
        f"mean return G₁ of the rollouts (nats)\nmean of the last {WINDOW} steps, ± s.e. over seeds"
    )
    figure.axes[0].legend()
    figure.savefig(path, format="png")


def size_row(size: str, k: int) -> str:
    """Name of a run of Figure 3. The shipped size is in the table."""
    if size == "predistilled":
        return "LLMR (K = 1)" if k == 1 else f"KETCHUP, K = {k}"
    return f"{size} student, K = {k}"


def _curves(records: Sequence[Record], task: str, size: str, k: int) -> list[list[float]]:
    wanted = size_row(size, k)
    found = [r["curve"] for r in records if r["task"] == task and r["row"] == wanted and r.get("curve")]
    return [[line["return_mean"] for line in curve] for curve in found]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """[n] → [n]: mean of the last `window` values up to each, of fewer at the start."""
    total, stop = np.concatenate([[0.0], np.cumsum(values)]), np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (total[stop] - total[start]) / (stop - start)
