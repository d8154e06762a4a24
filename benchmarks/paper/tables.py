"""Markdown tables from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.paper.settings import ABLATIONS, REFERENCE, TABLE, TASKS, Metric, Task
from benchmarks.paper.statistics import Comparison, Mean, holm

Record = Mapping[str, Any]
Values = dict[int, float]
"""Seed → value."""

RETURN = Metric("return", "return")
LENGTH = Metric("length", "length")
BEFORE = (
    ("teacher", "teacher"),
    ("student", "student, not distilled"),
    ("predistilled", "student before (pre-distilled)"),
)


def value_of(record: Record, metric: Metric) -> float:
    evaluation = record["evaluation"]
    if metric == RETURN:
        return float(evaluation["returns"]["mean"])
    return float(evaluation["length_mean"] if metric == LENGTH else evaluation["metrics"][metric.key])


def by_seed(records: Iterable[Record], task: str, row: str, metric: Metric) -> Values:
    return {r["seed"]: value_of(r, metric) for r in records if r["task"] == task and r["row"] == row}


def paper_table(records: Iterable[Record]) -> str:
    """Table 1: all methods on all tasks; then each row against LLMR."""
    records, parts = list(records), []
    for task in TASKS.values():
        rows = [name for name, _ in BEFORE] + [row.name for row in TABLE]
        found = [name for name in rows if by_seed(records, task.name, name, RETURN)]
        if found:
            parts += [
                f"### {task.title}",
                "",
                *_table(records, task, found, dict(BEFORE)),
                "",
                *_against(records, task),
                "",
                *_with_a_baseline(records, task),
            ]
    return "\n".join(parts)


def summary_table(records: Iterable[Record]) -> str:
    """All methods on all tasks in one table, to one decimal; docs/results.md has it."""
    records = list(records)
    columns = [(task, metric) for task in TASKS.values() for metric in (RETURN, task.headline, LENGTH)]
    titles = [f"{t.name}: {m.title}" if m == RETURN else m.title for t, m in columns]
    before, after = [("predistilled", "student before")], [("teacher", "teacher")]
    lines = ["| | " + " | ".join(titles) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name, title in [*before, *((row.name, row.name) for row in TABLE), *after]:
        values = [list(by_seed(records, task.name, name, metric).values()) for task, metric in columns]
        if any(values):
            cells = [_short(Mean.of(v), m) if v else "–" for v, (_, m) in zip(values, columns, strict=True)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(mean: Mean, metric: Metric) -> str:
    error = f" ± {mean.se:.1f}" if mean.se is not None and metric != LENGTH else ""
    return f"{mean.mean:.1f}{error}".replace("-", "−")


def _table(records: list[Record], task: Task, names: Iterable[str], titles: Mapping[str, str]) -> list[str]:
    metrics = [RETURN, *task.metrics, LENGTH]
    lines = [
        "| | " + " | ".join(m.title + ("" if m.higher else " ↓") for m in metrics) + " | seeds |",
        "|" + " --- |" * (len(metrics) + 2),
    ]
    for name in names:
        means = [Mean.of(list(by_seed(records, task.name, name, metric).values())) for metric in metrics]
        lines.append(f"| {titles.get(name, name)} | " + " | ".join(map(str, means)) + f" | {means[0].n} |")
    return lines


def _against(records: list[Record], task: Task) -> list[str]:
    """Every learned row minus LLMR, paired by seed."""
    pairs = {row.name: REFERENCE for row in TABLE if row.name != REFERENCE}
    return _differences(
        records,
        task,
        pairs,
        f"Difference from {REFERENCE}, paired by seed (p: two-sided paired t-test; in brackets: Holm-adjusted over "
        "the KETCHUP rows)",
    )


def _with_a_baseline(records: list[Record], task: Task) -> list[str]:
    """K with a baseline minus LLMR with the same one."""
    pairs = {row.name: row.against for row in TABLE if row.against}
    lines = _differences(records, task, pairs, "Difference from LLMR with the same baseline")
    return [*lines, ""] if lines else []


def _differences(records: list[Record], task: Task, pairs: Mapping[str, str], title: str) -> list[str]:
    """pairs: row → the row it is compared with."""
    metrics = [RETURN, task.headline]
    compared = {
        m: {
            name: Comparison.of(v, reference)
            for name, other in pairs.items()
            if (v := by_seed(records, task.name, name, m)).keys()
            & (reference := by_seed(records, task.name, other, m)).keys()
        }
        for m in metrics
    }
    names = list(compared[RETURN])
    if not names:
        return []
    adjusted = {m: _adjusted(compared[m]) for m in metrics}
    lines = [
        title,
        "",
        "| | " + " | ".join(f"Δ {m.title} | p" for m in metrics) + " | seeds |",
        "|" + " --- |" * (2 * len(metrics) + 2),
    ]
    for name in names:
        cells = [
            f"{_signed(compared[m][name].difference)} | {_p(compared[m][name].p, adjusted[m].get(name))}"
            for m in metrics
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {compared[RETURN][name].difference.n} |")
    return lines


def _adjusted(compared: Mapping[str, Comparison]) -> dict[str, float]:
    ps = {name: c.p for name, c in compared.items() if name.startswith("KETCHUP") and c.p is not None}
    return dict(zip(ps, holm(list(ps.values())), strict=True))


def _signed(mean: Mean) -> str:
    return f"{mean.mean:+.2f}" + (f" ± {mean.se:.2f}" if mean.se is not None else "")


def _p(p: float | None, adjusted: float | None) -> str:
    if p is None:
        return "–"
    return _small(p) + (f" ({_small(adjusted)})" if adjusted is not None else "")


def _small(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def ablation_tables(records: Iterable[Record]) -> str:
    """Those of which something was run that is not in the table already."""
    records, parts = list(records), []
    in_table = {row.name for row in TABLE}
    for ablation in ABLATIONS:
        task = TASKS[ablation.task]
        names = [row.name for row in ablation.rows if by_seed(records, task.name, row.name, RETURN)]
        if not in_table.issuperset(names):
            before = [row.student for row in ablation.rows if row.name in names]
            starts = [s for s in dict.fromkeys(before) if by_seed(records, task.name, s, RETURN)]
            title = {s: f"*before: {s}*" for s in starts}
            parts += [f"### {ablation.title} ({task.name})", "", *_table(records, task, [*starts, *names], title), ""]
    return "\n".join(parts)
