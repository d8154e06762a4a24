"""The arithmetic behind benchmarks/results: against SciPy, published examples and tables worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from benchmarks.paper import tables
from benchmarks.paper.__main__ import PARTS, chosen, missing
from benchmarks.paper.pictures import running_mean
from benchmarks.paper.runs import Run, words_of
from benchmarks.paper.settings import ABLATIONS, TABLE, TASKS, Row, ablation_runs, table_runs
from benchmarks.paper.statistics import Comparison, Mean, holm
from ketchup_cache.config.commands import LearnConfig

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


@given(VALUES)
def test_standard_error_is_scipys(values):
    mean = Mean.of(values)
    assert mean.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert mean.se == pytest.approx(stats.sem(values), rel=1e-6, abs=1e-9)


def test_paired_test_of_a_textbook():
    # Student (1908), Cushny and Peebles's sleep data: t = 4.06, two-sided p = 0.00283 with 9 degrees of freedom
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    result = Comparison.of(dict(enumerate(second)), dict(enumerate(first)))
    assert result.difference.mean == pytest.approx(1.58)
    assert result.difference.mean / result.difference.se == pytest.approx(4.0621, abs=1e-4)
    assert result.p == pytest.approx(0.00283, abs=1e-5)


def test_only_common_seeds_are_pairs():
    difference = Comparison.of({0: 1.0, 1: 2.0, 2: 9.0, 7: 100.0}, {0: 0.5, 1: 1.0, 2: 1.0, 3: -50.0}).difference
    assert (difference.n, difference.mean) == (3, pytest.approx((0.5 + 1 + 8) / 3))


def test_no_spread_and_too_few():
    assert (Mean.of([2.5]), str(Mean.of([2.5]))) == (Mean(2.5, None, 1), "2.50")
    assert Comparison.of({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert Comparison.of({0: 1.0}, {0: 2.0}).p is None


def test_holm_by_hand():
    # sorted: 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.04 × 1, never falling
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_lies_between_nothing_and_bonferroni(ps):
    for p, adjusted in zip(ps, holm(ps), strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p) + 1e-12


def record(task, row, seed, value, metric, length=10.0):
    metrics = {m.key: metric for m in TASKS[task].metrics}
    evaluation = {"returns": {"mean": value}, "metrics": metrics, "length_mean": length}
    return {"task": task, "row": row, "seed": seed, "evaluation": evaluation}


def test_table_by_hand():
    task, llmr, ours = next(iter(TASKS)), "LLMR (K = 1)", "KETCHUP, K = 4"
    records = [record(task, llmr, s, -10 - s, 50.0 + s) for s in range(3)]
    records += [record(task, ours, s, -8 - 2 * s, 51.0 + s) for s in range(3)]
    lines = tables.paper_table(records).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    # the row of differences comes last: 2, 1, 0 in return, always 1 in the metric
    assert cells[ours][0] == f"+1.00 ± {1 / math.sqrt(3):.2f}"
    assert cells[ours][1].startswith(f"{stats.ttest_rel([-8, -10, -12], [-10, -11, -12]).pvalue:.3f}")
    assert cells[ours][2] == "+1.00 ± 0.00"
    assert cells[llmr][0] == f"-11.00 ± {1 / math.sqrt(3):.2f}"
    assert cells[llmr][-1] == "3"


def test_every_row_is_a_run_that_learn_takes():
    for task, row, seed in [*table_runs(), *ablation_runs()]:
        options = {**TASKS[task].decoding, **row.learning(TASKS[task], seed)}
        LearnConfig(student="s", cache="c", teacher="t" if row.needs_samples else None, **options)


def test_runs_differ_in_their_keys():
    runs = [Run(*run) for run in [*table_runs(), *ablation_runs()]]
    different = {(run.task, run.name, run.seed, repr(run.row)) for run in runs}
    assert len({run.key for run in runs}) == len(different) < len(runs)  # an ablation shares rows with the table
    assert len({(run.task, run.name, run.seed) for run in runs}) == len(different)  # a name always means the same
    assert Run("translate", Row("a", {"k": 4})).key != Run("translate", Row("a", {"k": 2})).key


def test_what_has_a_record_is_not_run_again():
    everything = missing(PARTS, list(TASKS), [])
    assert len({run.key for run in everything}) == len(everything)
    done, left = everything[::2], everything[1::2]
    assert missing(PARTS, list(TASKS), [{"key": run.key} for run in done]) == left
    assert {run.task for run in missing(["table"], ["reason"], [])} == {"reason"}
    # the same options on the dev split are another run
    row = TABLE[-1]
    assert Run("reason", row).key != Run("reason", row, split="dev").key


def test_a_part_of_the_runs():
    everything, some = missing(["table"], ["reason"], []), ["KETCHUP, K = 8", "LLMR (K = 1)"]
    assert chosen(everything, [], None) == everything
    assert {run.seed for run in chosen(everything, [], 2)} == {0, 1}
    assert [(run.name, run.seed) for run in chosen(everything, some, 2)] == [(n, s) for s in range(2) for n in some]


def test_k_with_a_baseline_is_compared_with_llmr_with_the_same():
    rows = {row.name: row for row in TABLE}
    combined = [row for row in TABLE if row.against]
    for row in combined:
        other = rows[row.against].options
        assert (other["baseline"], other["method"]) == (row.options["baseline"], "llmr")
    name, other = combined[0].name, combined[0].against
    records = [record("reason", name, s, -5.0 - s, 40.0) for s in range(2)]
    records += [record("reason", other, s, -8.0, 30.0) for s in range(3)]
    text = tables.paper_table(records)
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} | +2.50 ± 0.50 |"))
    assert line.endswith("| 2 |"), text


def test_panels_of_figure_1_share_their_labels():
    """A task without one of the rows must not move the others up."""
    pytest.importorskip("matplotlib")
    from benchmarks.paper.pictures import returns_by_method

    rows = [TABLE[i].name for i in (0, 4, 7)]
    records = [record("translate", name, 0, -10.0 - i, 1.0) for i, name in enumerate(rows)]
    records += [record("reason", name, 0, -20.0 - i, 1.0) for i, name in enumerate(rows) if i != 1]
    first, second = returns_by_method(records).axes
    at = {label.get_text(): place for label, place in zip(first.get_yticklabels(), first.get_yticks(), strict=True)}
    for axes, value in ((first, -10.0), (second, -20.0)):
        drawn = {tuple(point) for point in axes.collections[-1].get_offsets().tolist()}
        assert drawn <= {(value - i, float(at[name])) for i, name in enumerate(rows)}
    assert len(drawn) == 2


def test_an_ablation_is_shown_once_it_has_rows_of_its_own():
    ablation = ABLATIONS[0]
    shared = [record(ablation.task, row.name, 0, -1.0, 1.0) for row in TABLE]
    assert tables.ablation_tables(shared) == ""
    own = next(row.name for row in ablation.rows if row.name not in {r.name for r in TABLE})
    text = tables.ablation_tables([*shared, record(ablation.task, own, 0, -2.5, 7.0)])
    assert (text.count("###"), ablation.title in text, f"| {own} | -2.50 | 7.00 |" in text) == (1, True, True), text


def test_rows_are_named_once():
    for rows in (TABLE, *(ablation.rows for ablation in ABLATIONS)):
        assert len({row.name for row in rows}) == len(rows)


def test_words_of_a_command():
    words = words_of({"lr": 1e-3, "batch_size": 8, "greedy": True, "importance": False})
    assert list(words) == "--lr 0.001 --batch-size 8 --greedy --no-importance".split()


def test_a_row_learns_by_its_method_and_at_its_rate():
    by_name = {row.name: row for row in TABLE}
    needs = [(by_name[n].needs_outputs, by_name[n].needs_samples) for n in ("KL", "JS", "reverse KL")]
    assert needs == [(True, False), (True, True), (False, True)]
    for task in TASKS.values():
        ours, reverse = (by_name[name].learning(task, 1) for name in ("KETCHUP, K = 4", "reverse KL"))
        same = ("steps", "batch_size", "samples", "refresh_every", "seed")
        assert [ours[key] for key in same] == [reverse[key] for key in same]
        assert "keep_top" not in ours
        assert (reverse["keep_top"], reverse["lr"]) == (64, task.rates["reverse-kl"])
        assert by_name["JS"].learning(task, 0)["lr"] == task.rates["js"]
        assert Row("JS", {"method": "js", "lr": 1.0}).learning(task, 0)["lr"] == 1.0


def test_the_pages_tables_are_those_of_the_results():
    """Every line of the table in docs/results.md."""
    root = Path(__file__).parents[2]
    records = json.loads((root / "benchmarks/results/paper.json").read_text())["records"]
    drawn = tables.summary_table(records).splitlines()
    assert (root / "benchmarks/results/paper-summary.md").read_text().rstrip().endswith("\n".join(drawn))
    page = (root / "docs/results.md").read_text()
    results = [line for line in page[page.index("## Three small") :].splitlines() if line.startswith("|")]
    assert results == drawn


def test_a_running_mean_is_of_fewer_at_the_start():
    assert running_mean(np.array([-8.0, -6.0, -7.0, -1.0]), 3) == pytest.approx([-8, -7, -7, -14 / 3])
