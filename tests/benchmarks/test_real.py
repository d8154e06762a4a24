"""The tables on real text: that every setting can run, that what won is a row, and the test between two rows."""

import json

import numpy as np
import pytest
import sacrebleu

from benchmarks.real import __main__ as real
from benchmarks.real.settings import COMPARED, DEV_SEEDS, GROUPS, LEARN, SEEDS, TASKS, rows
from ketchup_cache.config.commands import LearnConfig

PLACES = {"student": "s", "cache": "c", "teacher": "t", "eval_data": "d"}


def options_of(given):
    return {name: value for name, value in {**LEARN, **given}.items() if value is not None}


def finished(best: str = "K = 4, 0.001") -> dict:
    """Records of the runs on dev, where `best`, and the first of every other group, are better than the rest."""
    done = {}
    for group, settings in GROUPS.items():
        for place, label in enumerate(settings):
            bleu = 30.0 if label == best else 20.0 - place
            for seed in DEV_SEEDS:
                record = {"dev": {"best": {"metrics": {"bleu": bleu}}}, "score_s": 30.0}
                done[f"dev/{group}/{label}/{seed}"] = {"learn": record}
    done["outputs"] = {"rollout": {"rollouts": 4000, "seconds": 40.0}}
    return done


def test_every_group_has_the_same_number_of_runs_and_every_setting_is_one_that_learn_takes():
    assert {len(settings) * len(DEV_SEEDS) for settings in GROUPS.values()} == {16}
    for given in [options for settings in GROUPS.values() for options in settings.values()]:
        LearnConfig(**PLACES, **options_of(given))


def test_what_won_on_dev_is_a_row_of_the_table():
    done = finished()
    done["chosen"] = real.chosen(done)
    assert done["chosen"]["paper"] == {
        "label": "K = 4, 0.001",
        "dev_bleu": 30.0,
        "options": {**GROUPS["paper"]["K = 4, 0.001"]},
    }
    table = rows({group: won["options"] for group, won in done["chosen"].items()})
    assert len(table) == 23
    for given in table.values():
        alone = {"teacher": None} if given.get("method") == "kl" else {}
        LearnConfig(**PLACES | alone, **options_of(given))
    assert real.winner(done, "paper") == "K = 4"
    assert real.winner(done, "llmr") == "LLMR + mean"
    assert {real.winner(done, name) for pair in COMPARED for name in pair} <= {*table, "start", "SeqKD, new outputs"}
    assert real.affordable(done) == 3000  # 30 s of scoring, at 100 outputs a second


def test_records_of_several_processes_are_kept_and_name_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    place = real.Place(TASKS["ende"], tmp_path / "work", tmp_path)
    place.add("b", {"model": str(place / "starts/0/best")})
    place.add("a", {"bleu": 1.0})
    assert list(place.records().items()) == [("a", {"bleu": 1.0}), ("b", {"model": "starts/0/best"})]


def test_the_bootstrap_is_of_the_means_of_corpus_bleu_over_starts(tmp_path):
    place, rng = real.Place(TASKS["ende"], tmp_path, tmp_path), np.random.default_rng(0)
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
    found = real.bootstrap(place, "good", "bad", samples=200)
    assert found["difference"] == pytest.approx(means["good"] - means["bad"])
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found["p"] == 1 / 200
    none = real.bootstrap(place, "good", "good", samples=50)
    assert (none["difference"], none["low"], none["high"]) == (0, 0, 0)
    assert none["p"] > 1
