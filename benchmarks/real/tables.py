"""The tables of what was measured on real text, as Markdown, and where they stand in the docs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real import figures
from benchmarks.real.choices import (
    SEQKD,
    Records,
    affordable,
    best,
    best_rate,
    comparisons,
    cost_to_reach,
    gain_of_doubling,
    grid_name,
    holm,
    labels,
    runs,
    winner,
)
from benchmarks.real.place import RESULTS
from benchmarks.real.settings import BATCH, COMPARED, FRESH, GROUPS, MARGIN, REFRESH, REUSE, STEPS, TASKS
from ketchup_cache.report.plots import write_png

ROOT = Path(__file__).resolve().parents[2]
GRADIENT = """`analyze --gradient` on rollouts of the starts. Cosine with the unbiased gradient; agreement of halves;
norm over that of the reference; signal over noise of a batch of 256; how hard it pushes the length, K = 1 at −1.
"""
SHORT = ("start", *SEQKD[:3], "KL", "reverse KL", "reverse KL, offline", FRESH, "MiniLLM", "LLMR", "LLMR, mean")
SHORT += ("K = 4",)
"""Rows of the table in docs/results.md, beside the winners."""
SHORTEST = ("start", SEQKD[1], FRESH)
"""The same of the README."""


def mean_se(values: Sequence[float], digits: int = 1) -> str:
    """Over starts."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


def columns(done: Records) -> dict[str, Callable[[list[dict[str, Any]]], str]]:
    teacher = done["teacher"]["test"]

    def per_run(run: Mapping[str, Any], name: str) -> float:
        return run["learn"].get(name, 0) if "learn" in run else 0

    def spent(run: Mapping[str, Any]) -> float:
        """Of all steps: a run that was interrupted has the seconds of its last part alone in `seconds`."""
        phases = [run.get("learn", {}).get(name) for name in ("sample_s", "score_s", "load_s", "train_s", "eval_s")]
        return run.get("seconds", 0) if None in phases else sum(phases)

    return {
        "BLEU": lambda found: mean_se([run["test"]["bleu"] for run in found]),
        "chrF": lambda found: mean_se([run["test"]["chrf"] for run in found]),
        "return": lambda found: mean_se([run["test"]["return"] for run in found], 2),
        "length / teacher's": lambda found: mean_se(
            [run["test"]["length_mean"] / teacher["length_mean"] for run in found], 3
        ),
        "finished": lambda found: f"{100 * np.mean([run['test']['finished'] for run in found]):.1f} %",
        "last BLEU": lambda found: mean_se([run.get("last", run["test"])["bleu"] for run in found]),
        "dev − test": lambda found: f"{np.mean([run['dev']['bleu'] - run['test']['bleu'] for run in found]):+.1f}",
        "student tokens": lambda found: f"{np.mean([per_run(run, 'tokens') for run in found]) / 1000:,.0f}k",
        "scored": lambda found: f"{np.mean([run.get('scored', 0) for run in found]) / 1000:,.0f}k",
        "generated": lambda found: f"{np.mean([run.get('generated', 0) for run in found]) / 1000:,.0f}k",
        "cache": lambda found: f"{np.mean([run.get('bytes', 0) for run in found]) / 1e6:.1f} MB",
        "seconds": lambda found: f"{np.mean([spent(run) for run in found]):.0f}",
        "starts": lambda found: str(len(found)),
    }


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_table(done: Records, wanted: Sequence[str], names: Sequence[str] | None = None) -> str:
    """Of the test split. names: of the columns; None for all."""
    shown = {name: of for name, of in columns(done).items() if names is None or name in names}
    body = [[label, *(of(runs(done, label)) for of in shown.values())] for label in wanted if runs(done, label)]
    best_of = done["teacher"]["test"]
    given = {"BLEU": f"{best_of['bleu']:.1f}", "chrF": f"{best_of['chrf']:.1f}", "return": f"{best_of['return']:.2f}"}
    given |= {"length / teacher's": "1", "finished": f"{100 * best_of['finished']:.1f} %"}
    teacher = ["teacher", *(given.get(name, "") for name in shown)]
    return markdown(["", *shown], [*body, teacher])


def comparisons_table(done: Records) -> str:
    """The tests that are made by now."""
    pairs = comparisons(done)
    found = [done.get(f"compared/{one}/{other}") for one, other in pairs]
    tested = [record for record in found[: len(COMPARED)] if record]
    corrected = iter(holm([record["p"] for record in tested]) if len(tested) == len(COMPARED) else [])
    body = []
    for place, record in enumerate(found):
        if record:
            interval = f"{record['low']:+.2f} to {record['high']:+.2f}"
            p = f"{next(corrected, float('nan')):.3f}" if place < len(COMPARED) else ""
            holds = f"{record['low_95']:+.2f} {'>' if record['low_95'] > -MARGIN else '≤'} −{MARGIN}"
            last = holds if place == len(COMPARED) else ""
            body.append([f"{record['one']} − {record['other']}", f"{record['difference']:+.2f}", interval, p, last])
    return markdown(["BLEU, test", "difference", "95 % interval", "p (Holm)", "one-sided, against the margin"], body)


def dev_table(done: Records) -> str:
    """What was chosen, and from what."""
    body = []
    for group, settings in {**GROUPS, "seqkd": None}.items():
        tried = settings or sorted({name.split("/")[2] for name in done if name.startswith("dev/seqkd/")})
        for label in tried:
            found = [record["learn"] for name, record in done.items() if name.startswith(f"dev/{group}/{label}/")]
            if found:
                won = "chosen" in done and done["chosen"][group]["label"] == label
                scores = ", ".join(f"{best(record):.2f}" for record in found)
                alone = f"{np.mean([best(record) for record in found]):.2f}"
                body.append([group, label, alone, scores, "**chosen**" if won else ""])
    return markdown(["group", "setting", "dev BLEU, mean", "by start", ""], body)


def tried_table(done: Records) -> str:
    """Experiments B, C and E on dev: the best evaluation of each run, and the last, over starts."""
    labels = dict.fromkeys(name.split("/")[1] for name in done if name.startswith("tried/"))
    body = []
    for label in labels:
        found = [done[name]["learn"] for name in done if name.startswith(f"tried/{label}/")]
        last = [record["curve"][-1] for record in found]
        figures = [[best(record) for record in found], *([line[of] for line in last] for of in ("bleu", "length_mean"))]
        body.append([label, *map(mean_se, figures), str(len(found))])
    return markdown(["dev", "BLEU, best", "BLEU, last", "length, last", "starts"], body)


def starts_text(name: str, done: Records) -> str:
    teacher = done["teacher"]
    rates = sorted(float(key.split("/")[1]) for key in done if key.startswith("grid/"))
    grid = ", ".join(f"{lr:g}: {best(done[grid_name(lr)]):.2f}" for lr in rates)
    epochs = TASKS[name].epochs
    text = f"Teacher: {teacher['dev']['bleu']:.1f} BLEU on dev, {teacher['test']['bleu']:.1f} on test, greedy.\n"
    if grid:
        text += f"Dev BLEU of a start by its learning rate ({epochs} epochs): {grid}.\n"
    else:
        text += f"Tokenizer, base, rates and settings are those of {TASKS[name].like}.\n"
    if len(gains := gain_of_doubling(done)) >= 3:
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        what = f"Twice the epochs at {best_rate(done):g} change the dev BLEU of starts by"
        text += f"{what} {np.mean(gains):+.2f} ({each}).\n"
    text += f"A row trains on {STEPS * BATCH:,} completions, "
    return text + f"and refreshes its rollouts every {REFRESH} steps, with {REUSE} uses of each.\n"


def gradient_table(done: Records) -> str:
    """Experiment A: means over the starts that it was made on."""
    found = [record for name, record in done.items() if name.startswith("gradient/")]
    names = ("cosine", "agreement", "norm", "snr", "length")
    body = []
    for estimators in zip(*found, strict=True):
        values = ([one[name] for one in estimators if one[name] is not None] for name in names)
        body.append([estimators[0]["name"], *(f"{np.mean(known):.2f}" if known else "–" for known in values)])
    return markdown([f"{len(found)} start" + "s" * (len(found) > 1), *names], body)


def variance_table(done: Records) -> str:
    """The paper's Figure 2 in numbers: means over starts."""
    found = [record for name, record in done.items() if name.startswith("variance/")]
    body = []
    for kind in ("by_k", "by_weights"):
        for estimators in zip(*(record[kind] for record in found), strict=True):
            first = estimators[0]
            name = f"K = {first['k']}" if kind == "by_k" else f"{first['weights']} {first['lam']:.3g}"
            body.append([name, *(mean_se([one[of] for one in estimators]) for of in ("variance", "bias"))])
    return markdown([f"{len(found)} start" + "s" * (len(found) > 1), "variance", "bias"], body)


def page(name: str, done: Records) -> str:
    """All that is known of a task."""
    parts = [f"# Multi30k, {name}\n", "Written by `python -m benchmarks.real --write` from the results beside it.\n"]
    parts.append(starts_text(name, done))
    if any(key.startswith("gradient/") for key in done):
        parts += ["## The gradient diagnostic, before anything was trained\n", GRADIENT, gradient_table(done)]
    if any(key.startswith("variance/") for key in done):
        covariance = np.mean([record["covariance"] for key, record in done.items() if key.startswith("variance/")])
        parts += ["## Bias and variance of the return of the first token\n", variance_table(done)]
        parts.append(f"Covariances make {covariance:.0%} of the variance of the sum of a rollout's gaps.\n")
    if any(key.startswith("dev/") for key in done):
        parts += ["## Chosen on the dev set\n", dev_table(done)]
    if any(key.startswith("tried/") for key in done):
        parts += ["## The price of ending, the anchor, other rollouts, and their uses, on dev\n", tried_table(done)]
    if "chosen" in done:
        parts += ["## Test split\n", rows_table(done, labels(done))]
        why = (
            f"as for {TASKS[name].like}"
            if "inherited" in done
            else "as many as cost the teacher seconds of the scoring"
        )
        parts.append(f"SeqKD's new outputs: {affordable(done):,}, {why}.\n")
        if any(key.startswith("compared/") for key in done):
            parts += ["## Compared\n", comparisons_table(done)]
        new, paper = winner(done, "new"), winner(done, "paper")
        if len(runs(done, new)) == len(runs(done, paper)) == 5:
            cost = cost_to_reach(done, new, paper)
            ratio = "some start never does"
            if cost["ratio"] is not None:
                ratio = f"{cost['ratio']:.2f} (up to {cost['high']:.2f})"
            what = f"Tokens until {new} has the best dev BLEU of {paper} and keeps it, over those of {paper}"
            parts.append(f"{what}: {ratio}.\n")
    return "\n".join(parts)


def short_table(done: Records, rows: Sequence[str]) -> str:
    """The winners among a few rows."""
    won = [winner(done, group) for group in ("llmr", "paper", "new")]
    wanted = [label for label in labels(done) if label in {*rows, *won}]
    return rows_table(done, wanted, ("BLEU", "chrF", "return", "length / teacher's", "cache", "starts"))


def blocks(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table between the marks `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises ValueError where a table has no place in it.
    """
    for name, table in tables.items():
        marks = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        text, found = re.subn(marks, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the marks of {name} are there {found} times, and not once")
    return text


def pages() -> dict[Path, str]:
    """Every file that holds tables of the results, as it ought to be."""
    found, tables, first = {}, {}, {}
    for name in TASKS:
        file = RESULTS / f"{name}.json"
        if file.exists() and "teacher" in (done := json.loads(file.read_text(encoding="utf-8"))):
            found[file.with_suffix(".md")] = page(name, done)
            if "chosen" in done:
                tables[f"real table of {name}"] = short_table(done, SHORT)
                first |= {f"real table of {name}": short_table(done, SHORTEST)} if name == "ende" else {}
    for file, shown in ((ROOT / "README.md", first), (ROOT / "docs/results.md", tables)):
        found[file] = blocks(file.read_text(encoding="utf-8"), shown)
    return found


def write() -> None:
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT))
    for name in TASKS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            for title, figure in figures.figures(json.loads(file.read_text(encoding="utf-8"))):
                write_png(figure, RESULTS / f"{name}-{title}.png")
