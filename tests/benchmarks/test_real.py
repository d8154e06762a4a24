"""The tables on real text: that every setting can run, that what won is a row, the tests, and what the docs say."""

import json
import time

import numpy as np
import pytest
import sacrebleu

from benchmarks.real import __main__ as real, choices, tables
from benchmarks.real.place import Place
from benchmarks.real.settings import (
    BATCH,
    COMPARED,
    DEV_SEEDS,
    GROUPS,
    LEARN,
    OTHER_SEEDS,
    RATES,
    SEEDS,
    SEQKD_RATES,
    STEPS,
    TASKS,
    experiments,
)
from ketchup_cache.config.commands import LearnConfig

PLACES = {"student": "s", "cache": "c", "eval_data": "d"}


def options_of(given, teacher="t"):
    options = {**LEARN, **given, "teacher": teacher, "out": "o"} | (
        {} if teacher else {"refresh_every": None, "reuse": None}
    )
    return {name: value for name, value in options.items() if value is not None}


def trained(bleu: float, **more) -> dict:
    """A run that had `bleu` on dev after 12 of 24 steps, and less at the end."""
    curve = [
        {"step": step, "best": score == bleu, "bleu": score, "length_mean": 15.0, "tokens": 100 * step}
        for step, score in ((0, 10.0), (12, bleu), (24, bleu - 1))
    ]
    return {"tokens": 2400, "score_s": 30.0, "curve": curve, **more}


def finished(best: str = "K = 4, 0.0004") -> dict:
    """Records of the runs on dev, where `best`, and the first of every other group, are better than the rest."""
    done = {"outputs": {"rollout": {"rollouts": 4000, "seconds": 40.0}}, "data": {}, "base": {}}
    split = {"bleu": 33.0, "chrf": 55.0, "return": -0.1, "length_mean": 16.0, "finished": 1.0}
    done["teacher"] = {"dev": split, "test": split}
    for place, lr in enumerate(RATES):
        done[f"grid/{lr:g}"] = trained(20.0 - place)
    done |= {f"starts/{seed}": trained(20.0) for seed in (*DEV_SEEDS, *SEEDS)}
    done |= {f"begun/{seed}": {} for seed in (*DEV_SEEDS, *SEEDS)}
    for seed in (DEV_SEEDS[0], *OTHER_SEEDS):
        cosines = {"K = 1 (LLMR)": 1.0, "MiniLLM": 0.5 + seed / 10}
        others = {"agreement": 0.8, "norm": 1.0, "snr": 2.0, "length": None}
        figures = {"variance": 10.0 + seed, "bias": 1.0}
        done[f"offline/{seed}"] = {}
        done[f"gradient/{seed}"] = [{"name": name, "cosine": cosine, **others} for name, cosine in cosines.items()]
        by_weights = [{"weights": "flat", "lam": 0.25, **figures}]
        done[f"variance/{seed}"] = {"covariance": 0.6, "by_k": [{"k": 2, **figures}], "by_weights": by_weights}
    done |= {f"doubled/{seed}": trained(20.0 + seed / 10) for seed in real.CONVERGED}
    groups = {**GROUPS, "seqkd": {f"{lr:g}": {} for lr in SEQKD_RATES}}
    for group, settings in groups.items():
        for place, label in enumerate(settings):
            for seed in DEV_SEEDS:
                done[f"dev/{group}/{label}/{seed}"] = {"learn": trained(30.0 if label == best else 20.0 - place)}
    return done


def test_every_group_has_the_same_number_of_runs_and_every_setting_is_one_that_learn_takes():
    assert {len(settings) * len(DEV_SEEDS) for settings in GROUPS.values()} == {16}
    for given in [options for settings in GROUPS.values() for options in settings.values()]:
        LearnConfig(**PLACES, **options_of(given))


def test_what_won_on_dev_is_a_row_of_the_table():
    done = finished()
    done["chosen"] = choices.chosen(done)
    won = {"label": "K = 4, 0.0004", "dev_bleu": 30.0, "options": {**GROUPS["paper"]["K = 4, 0.0004"]}}
    assert done["chosen"]["paper"] == won
    assert done["chosen"]["seqkd"]["options"] == {"lr": SEQKD_RATES[0]}
    table = choices.table_rows(done)
    assert len(table) == 25 + 16
    for row in table.values():
        LearnConfig(**PLACES, **options_of(row.options, "t" if row.source == "refreshed" else None))
    for options in experiments(done["chosen"]["rows"]).values():
        LearnConfig(**PLACES, **options_of(options))
    assert choices.winner(done, "paper") == "K = 4"
    assert choices.winner(done, "llmr") == "LLMR, mean"
    assert {choices.winner(done, name) for pair in COMPARED for name in pair} <= {*table, "start", "SeqKD, new outputs"}
    assert choices.best_gradient(done) == "K = 4"
    assert choices.affordable(done) == 3000  # 30 s of scoring, at 100 outputs a second
    assert choices.gain_of_doubling(done) == pytest.approx([0.5, 0.6, 0.0])  # starts 5, 6 and 0


def work_through(place: Place, monkeypatch) -> list[str]:
    """The names of all jobs that are left, in the order in which they are done, when each writes a made-up record."""
    monkeypatch.setattr(real, "bootstrap", lambda *_: {"difference": 1, "low": 0.5, "high": 1.5, "p": 0.01})
    test = {"bleu": 25.0, "chrf": 50.0, "return": -1.0, "length_mean": 15.2, "finished": 0.99}
    names = []
    while True:
        done = place.records()
        if (name := next((name for name, _ in real.order(place) if name not in done), None)) is None:
            return names
        kind, *rest = name.split("/")
        record = {"learn": trained(22.0), "test": test, "dev": test, "source": "refreshed", "seed": 0, "scored": 600}
        if kind in ("inherited", "chosen"):
            record = dict(real.order(place))[name]() if place.task.like else choices.chosen(place.records())
        elif kind in ("starts", "doubled"):
            record = trained(22.0)
        elif kind in ("offline", "gradient", "variance"):
            record = finished()[f"{kind}/{OTHER_SEEDS[0]}"]
        elif kind == "compared":
            given = {"difference": 1.0, "low": 0.5, "high": 1.5, "p": 0.01, "low_95": 0.6}
            record = {"one": rest[0], "other": rest[1], **given}
        place.add(name, record)
        names.append(name)


def test_every_job_comes_once_and_the_page_has_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real.place.RESULTS", tmp_path)
    place = Place(TASKS["ende"], tmp_path / "work", tmp_path)
    for name, record in finished().items():
        place.add(name, record)
    names = work_through(place, monkeypatch)
    assert names[0] == "chosen"
    assert len(names) == len(set(names))
    done = place.records()
    compared = {row for pair in choices.comparisons(done) for row in pair}
    rows = ["start", *choices.SEQKD, *choices.table_rows(done)]
    runs = [name for name in names if name.startswith("run/")]
    assert len(runs) == sum(len(SEEDS if row in compared else OTHER_SEEDS) for row in rows)
    assert {name.split("/")[1] for name in runs[: len(SEEDS) * len(compared)]} == compared
    text = tables.page("ende", done)
    assert f"A row trains on {STEPS * BATCH:,} completions" in text
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row} | 25.0"))
        starts = 5 if row in compared else 3
        if row != "start":
            figures = "-1.00 ± 0.00 | 0.950 ± 0.000 | 99.0 % | 25.0 ± 0.0 | +0.0 | 2k | 1k | 0k | 0.0 MB | 0 |"
            assert figures in line
        assert line.endswith(f"| {starts} |")
    assert "| MiniLLM | 0.70 | 0.80 | 1.00 | 2.00 | – |" in text  # seeds 5, 0, 1, 2
    assert "| K = 2 | 12.0 ± 1.1 | 1.0 ± 0.0 |\n| flat 0.25 | 12.0 ± 1.1 |" in text
    assert "Covariances make 60% of the variance" in text
    assert "| C: exact, anchor 0.1 | 22.0 ± 0.0 | 21.0 ± 0.0 | 15.0 ± 0.0 | 3 |" in text
    assert "| K = 4 − LLMR, mean | +1.00 | +0.50 to +1.50 | 0.030 |  |" in text
    assert "| +0.60 > −0.3 |" in text


def test_a_task_that_is_like_another_has_its_settings_and_looks_at_no_dev_set(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real.place.RESULTS", tmp_path)
    first = finished()
    for name, record in {**first, "chosen": choices.chosen(first)}.items():
        Place(TASKS["ende"], tmp_path / "work", tmp_path).add(name, record)
    place = Place(TASKS["deen"], tmp_path / "work", tmp_path)
    for name in ("data", "outputs", "base", "teacher"):
        place.add(name, first[name])
    names = work_through(place, monkeypatch)
    assert not [name for name in names if name.startswith(("dev/", "grid/", "tried/"))]
    assert place.records()["chosen"] == choices.chosen(first)
    runs = {}
    for name in (name for name in names if name.startswith("run/")):
        runs.setdefault(name.split("/")[1], []).append(int(name.split("/")[2]))
    compared = {"start", "SeqKD, new outputs", "K = 4", "LLMR, mean", "gae 0.7, centred", "reverse KL, fresh"}
    assert {row for row, seeds in runs.items() if seeds == [*SEEDS]} == compared
    assert {row for row, seeds in runs.items() if seeds == [*OTHER_SEEDS]} == {"SeqKD continued", "reverse KL"}
    assert len(runs) == len(compared) + 2
    assert "rates and settings are those of ende" in tables.page("deen", place.records())


def test_a_new_clone_makes_the_models_again_that_its_next_run_needs_and_keeps_their_records(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real.place.RESULTS", tmp_path)
    place = Place(TASKS["ende"], tmp_path / "work", tmp_path)
    known = {"teacher": {"pretrain": trained(33.0)}, "data": {}, "outputs": {}, "base": {}}
    known |= {f"{kind}/{seed}": trained(20.0) for kind in ("starts", "begun", "offline") for seed in SEEDS}
    for name, record in known.items():
        place.add(name, record)
    left, did = ["run/KL/0", "run/exact, offline/2"], []

    def job(name):
        return name, lambda: did.append(name) or ({"new": True} if name in left else trained(21.0))

    monkeypatch.setattr(real, "order", lambda _: map(job, [*known, *left]))
    assert real.work(place, time.time() + 60) == len(did)
    first = ["data", "teacher", "outputs", "base", "starts/0", "begun/0", "run/KL/0"]
    again = ["starts/2", "begun/2", "offline/2", "offline/0", "offline/1", "run/exact, offline/2"]
    assert did == first + again
    assert place.records() == known | {name: {"new": True} for name in left}
    assert real.work(place, time.time() + 60) == 0
    assert real.told(trained(21.0), trained(20.0)) == ", made again: BLEU on dev 19.0000, then 20.0000"


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert choices.holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # R: p.adjust(c(.01, .04, .03), "holm")
    assert choices.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_the_cost_to_reach_counts_from_where_the_score_stays():
    def run(*scores):
        curve = [{"bleu": s, "step": i, "tokens": 100 * i} for i, s in enumerate(scores)]
        return {"learn": {"curve": curve}, "scored": 150}

    done = {f"run/old/{seed}": run(10, 11, 12, 11) for seed in SEEDS}
    done |= {f"run/new/{seed}": run(10, 12, 13, 12.5) for seed in SEEDS}
    assert choices.cost_to_reach(done, "new", "old") == {"ratio": 0.5, "high": 0.5}
    done["run/new/3"] = run(10, 12, 11, 12)  # has it, loses it, and has it again
    assert choices.cost_to_reach(done, "new", "old")["ratio"] == pytest.approx((4 * 0.5 + 1.5) / 5)
    done["run/new/3"] = run(10, 12, 13, 11)
    assert choices.cost_to_reach(done, "new", "old") == {"ratio": None, "high": None}


def test_records_of_several_processes_are_kept_and_name_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real.place.RESULTS", tmp_path / "results")
    place = Place(TASKS["ende"], tmp_path / "work", tmp_path)
    place.add("b", {"model": str(place / "starts/0/best")})
    place.add("a", {"bleu": 1.0})
    assert list(place.records().items()) == [("a", {"bleu": 1.0}), ("b", {"model": "starts/0/best"})]


def test_the_bootstrap_is_of_the_means_of_corpus_bleu_over_starts(tmp_path):
    place, rng = Place(TASKS["ende"], tmp_path, tmp_path), np.random.default_rng(0)
    words = "ein mann geht mit dem hund in den park und lacht".split()
    targets = [" ".join(rng.choice(words, 8)) for _ in range(60)]
    means = {}
    for row, wrong in {"good": 0.1, "bad": 0.4}.items():
        scores = []
        for seed in SEEDS:
            outputs = [" ".join(w if rng.random() > wrong else "x" for w in text.split()) for text in targets]
            file = place / f"run/{row}/{seed}/test-outputs.jsonl"
            file.parent.mkdir(parents=True)
            lines = zip(outputs, targets, strict=True)
            file.write_text("".join(json.dumps({"output": o, "target": t}) + "\n" for o, t in lines))
            scores.append(sacrebleu.corpus_bleu(outputs, [targets]).score)
        means[row] = np.mean(scores)
    found = choices.bootstrap(place, "good", "bad", samples=200)
    assert found["difference"] == pytest.approx(means["good"] - means["bad"])
    assert 0 < found["low"] < found["low_95"] < found["difference"] < found["high"]
    assert found["p"] == 1 / 200
    none = choices.bootstrap(place, "good", "good", samples=50)
    assert (none["difference"], none["low"], none["high"]) == (0, 0, 0)
    assert none["p"] == 1


def test_every_table_in_the_docs_is_the_one_that_the_results_give():
    for file, text in tables.pages().items():
        assert file.read_text(encoding="utf-8") == text, f"{file}: run `python -m benchmarks.real --write`"


def test_a_table_stands_between_its_marks_and_is_never_left_out():
    page = "a\n<!-- t -->\nold\n<!-- end of t -->\nb"
    assert tables.blocks(page, {"t": "| new |"}) == "a\n<!-- t -->\n| new |\n<!-- end of t -->\nb"
    with pytest.raises(ValueError, match="the marks of t are there 0 times"):
        tables.blocks("no marks", {"t": "| new |"})
