"""Pictures: bias and variance against K (the paper's Figure 2). Curves of runs are in the page of `report`.

Each picture has a function that draws a Figure from plain numbers; `write_png` writes it. Lines differ by marker and
dash as well as by colour, so that they survive grey printing and colour blindness.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ketchup_cache.files import write_file

FIGURE: Any = {"dpi": 150, "layout": "constrained"}
"""Made outside pyplot, so that nothing is left behind in global state."""
MARKERS = "os^Dv<>Pp*hX"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")
"""Okabe and Ito's palette without its yellow, which is too pale for lines."""

PANELS = 4


# -------------------------------------------------------------------------------------------- bias and variance


def variance_bias_figure(analysis: Mapping[str, Any]) -> Figure:
    """Two panels over K (log2): variance of Ĝ_1 and bias Ĝ_1 − G_1; a line per policy, nearest to the teacher first.

    `analysis` is `Analysis.to_dict()`. Bars are ± one standard error over prompts. A variance of None is not drawn.
    Policies without a KL come last.
    """
    policies = sorted(analysis["policies"], key=lambda p: (p["kl_per_token"] is None, p["kl_per_token"] or 0))
    ks = sorted({point["k"] for policy in policies for point in policy["by_k"]})
    columns = 1 if len(policies) <= 6 else 2
    figure = Figure((9, 4.1 + 0.18 * len(policies) / columns), **FIGURE)
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("variance", "bias"), strict=True):
        for i, policy in enumerate(policies):
            points = [(p["k"], p[quantity], p[f"{quantity}_se"] or 0) for p in policy["by_k"]]
            points = [point for point in points if point[1] is not None]
            if not points:
                continue
            kl = "unknown" if policy["kl_per_token"] is None else f"{policy['kl_per_token']:.3g} nats per token"
            # an order, so shades of one map: dark is near to the teacher
            style: Any = {"color": colormaps["cividis"](0.8 * i / max(len(policies) - 1, 1)), "capsize": 3}
            style |= {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)], "markersize": 5}
            label = f"{_short(policy['label'], 60 // columns)}   (KL {kl})"
            axes.errorbar(*zip(*points, strict=True), label=label, clip_on=False, **style)  # a bias of 0 is on the axis
        if not axes.lines:
            axes.text(0.5, 0.5, "needs 2 rollouts per prompt", ha="center", va="center", transform=axes.transAxes)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="K (steps per jump)", xlim=(ks[0] / 1.2, ks[-1] * 1.2), ylim=(0, None))
        axes.xaxis.set(major_locator=FixedLocator(ks), minor_locator=NullLocator(), major_formatter="{x:.0f}")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(title="Variance over a prompt's rollouts", ylabel="Var[Ĝ₁]  (logit units²)")
    panels[1].set(title="Bias of the K-step return", ylabel="E[Ĝ₁ − G₁]  (logit units)")
    # the bias panel holds every policy, the variance panel may not
    _legend(figure, panels[1], "Bars: ± 1 standard error over prompts", ncols=columns)
    return figure


def weights_figure(analysis: Mapping[str, Any]) -> Figure:
    """Variance of the first token's return against its bias, one panel per policy (at most `PANELS`): a line for each
    kind of weights, from K or 1/λ = 1, without bias, on.

    `analysis` is `Analysis.to_dict()`. Lower and further to the left is better.
    """
    policies = analysis["policies"][:PANELS]
    figure = Figure((4.6 * max(len(policies), 1), 4.2), **FIGURE)
    for axes, policy in zip(np.atleast_1d(figure.subplots(1, max(len(policies), 1))), policies, strict=False):
        kinds = {"comb (paper)": [(f"K={p['k']}", p) for p in policy["by_k"]]}
        for weights in ("flat", "gae"):
            given = [p for p in policy["by_weights"] if p["weights"] == weights]
            kinds[weights] = [(f"{p['lam']:.2g}", p) for p in given]
        for i, (name, points) in enumerate(kinds.items()):
            known = [(label, p["bias"], p["variance"]) for label, p in points if p["variance"] is not None]
            style: Any = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 5}
            axes.plot([bias for _, bias, _ in known], [variance for *_, variance in known], label=name, **style)
            for label, bias, variance in known:
                axes.annotate(label, (bias, variance), xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set(title=_short(policy["label"], 44), xlabel="Bias  (logit units)", ylabel="Var[Ĝ₁]  (logit units²)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------------- shared


def _legend(figure: Figure, axes: Axes, title: str | None, **options: Any) -> None:
    small: Any = {"fontsize": "small", "title_fontsize": "small", **options}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", title=title, **small)


def _short(label: str, longest: int = 60) -> str:
    """Long labels lose their middle: paths differ at their ends."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[-half:]}"


def write_png(figure: Figure, path: Path) -> None:
    """Raises WriteError."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_file(path, png.getvalue())
