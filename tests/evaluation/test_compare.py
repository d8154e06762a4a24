"""`compare`: p-values and intervals against a bootstrap by hand, and against sacrebleu's command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache.config.commands import CompareConfig
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.evaluation.compare import Comparison, compare

WORDS = "the cat sat on a mat and then it went to see another dog in town".split()


def rows(seed: int, share: float, n: int = 60) -> list[dict]:
    """Outputs of which a share is the target, the others have one word replaced."""
    rng = np.random.default_rng(7)
    targets = [" ".join(rng.choice(WORDS, rng.integers(5, 12))) for _ in range(n)]
    rng = np.random.default_rng(seed)
    outputs = [t if rng.random() < share else " ".join(["xx", *t.split()[1:]]) for t in targets]
    made = zip(targets, outputs, strict=True)
    return [{"id": f"{i:032x}", "prompt": f"p {i}", "target": t, "output": o} for i, (t, o) in enumerate(made)]


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def run(tmp_path: Path, a: list[dict], b: list[dict], **options) -> Comparison:
    return compare(CompareConfig(a=write(tmp_path / "a", a), b=write(tmp_path / "b", b), **options))


def test_a_mean_over_examples_is_resampled_in_pairs(tmp_path):
    a, b = rows(1, 0.4), rows(2, 0.7)
    (found,) = run(tmp_path, a, b, metrics="exact", resamples=2000).differences
    hits = [np.array([row["output"] == row["target"] for row in side], float) for side in (a, b)]
    rng, differences = np.random.default_rng(0), []
    for _ in range(2000):
        draw = rng.integers(0, 60, 60)
        differences.append(100 * (hits[1][draw].mean() - hits[0][draw].mean()))
    real = 100 * (hits[1].mean() - hits[0].mean())
    centred = np.abs(np.array(differences) - np.mean(differences))
    assert found.b - found.a == pytest.approx(real)
    assert found.p == pytest.approx((centred >= abs(real)).mean(), abs=0.02)  # other draws, so only nearly
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=2)


def test_returns_that_both_files_hold_are_resampled_in_pairs(tmp_path, capsys):
    a, b = rows(1, 0.4), rows(2, 0.7)
    rng = np.random.default_rng(3)
    before = rng.normal(-20, 9, 60)
    after = before + rng.normal(1, 1, 60)  # in pairs the difference is clear, and the two means are not
    for side, values in ((a, before), (b, after)):
        for row, value in zip(side, values.tolist(), strict=True):
            row |= {"return": value, "return_of": "G_1, logprob, teacher 0123"}
    made = run(tmp_path, a, b, metrics="exact", resamples=2000)
    found = made.differences[1]
    gain = after - before
    assert (found.metric, found.variant) == ("return", "G_1, logprob, teacher 0123")
    assert (found.a, found.b) == pytest.approx((before.mean(), after.mean()))
    half = 1.96 * gain.std() / 60**0.5  # the central limit's interval
    assert (found.low, found.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.05)
    assert found.p < 0.01
    del b[5]["return"]
    assert [d.metric for d in run(tmp_path, a, b, metrics="exact").differences] == ["exact"]
    assert "returns of different" not in capsys.readouterr().err
    b[5] |= {"return": -1.0, "return_of": "G_1, logprob, teacher 4567"}
    assert [d.metric for d in run(tmp_path, a, b, metrics="exact").differences] == ["exact"]
    assert "returns of different teachers" in capsys.readouterr().err


def test_p_values_of_equally_good_models_are_spread_evenly(tmp_path):
    """A law: of 60 pairs that differ by chance, about a twentieth has p < 0.05, not a third, and some p are large."""
    values = []
    for seed in range(60):
        made = run(tmp_path, rows(seed, 0.5), rows(1000 + seed, 0.5), metrics="exact", resamples=200)
        values.append(made.differences[0].p)
    assert sum(p < 0.05 for p in values) <= 8
    assert sum(p > 0.5 for p in values) >= 15


def test_corpus_metrics_are_sacrebleus_own(tmp_path):
    """Its command line prints the same scores and p-values."""
    a, b = rows(1, 0.4), rows(2, 0.7)
    found = {d.metric: d for d in run(tmp_path, a, b, metrics="bleu,chrf").differences}
    for name, side in (("sa", a), ("sb", b)):
        (tmp_path / name).write_text("".join(row["output"] + "\n" for row in side))
    (tmp_path / "ref").write_text("".join(row["target"] + "\n" for row in a))
    words = "-m sacrebleu ref -i sa sb -m bleu chrf --paired-bs -f text -w 4".split()
    printed = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    scores = re.findall(r"(\d+\.\d{4}) \(", printed.partition("sb")[2])
    for name, score, p in zip(("bleu", "chrf"), scores, re.findall(r"p = (\d\.\d+)", printed), strict=True):
        assert found[name].b == pytest.approx(float(score), abs=1e-4)
        assert found[name].p == pytest.approx(float(p), abs=1e-4)
    assert found["bleu"].variant.startswith("nrefs:1|bs:1000|seed:12345")


def test_rouge_knows_the_letters_of_the_references(tmp_path):
    a, b = ([row | {"target": "столица", "output": text} for row in rows(1, 1)] for text in ("город", "Столица!"))
    (found,) = run(tmp_path, a, b, metrics="rouge1", resamples=20).differences
    assert (found.a, found.b) == (0, 100)
    assert "of any script" in found.variant
    with pytest.raises(DataError, match="ascii loses 100% of the letters of the references"):
        run(tmp_path, a, b, metrics="rouge1", rouge_tokenizer="ascii")


def test_equal_outputs_differ_in_nothing(tmp_path):
    made = run(tmp_path, rows(1, 0.5), rows(1, 0.5))
    assert {(d.p, d.b - d.a) for d in made.differences} == {(1.0, 0.0)}
    assert (made.wins, made.losses) == ((), ())
    assert "not significantly different from" in made.quote


def test_a_function_of_the_users_is_resampled_as_a_whole(tmp_path):
    (found,) = run(
        tmp_path, rows(1, 0.1), rows(2, 0.9), metrics="tests.evaluation.test_compare:half", resamples=50
    ).differences
    exact = run(tmp_path, rows(1, 0.1), rows(2, 0.9), metrics="exact").differences[0]
    assert (found.a, found.b) == pytest.approx((exact.a / 2, exact.b / 2))
    assert found.p == pytest.approx(1 / 51)
    assert 0 < found.low < found.b - found.a < found.high


def half(outputs, targets):
    return 50 * sum(o == t for o, t in zip(outputs, targets, strict=True)) / len(outputs)


def test_examples_show_where_each_wins_and_the_line_is_one_to_quote(tmp_path):
    a, b = rows(1, 0.2), rows(1, 0.2)
    a[3] |= {"output": "nothing of the kind"}
    b[5] |= {"output": "\x1b[2Jnothing"}
    made = run(tmp_path, a, b, metrics="rouge1,bleu")
    assert [example["prompt"] for example in made.wins] == ["p 3"]
    assert [example["prompt"] for example in made.losses] == ["p 5"]
    assert "\x1b" not in str(made)
    assert re.fullmatch(r"rouge1 \d+\.\d\d, not significantly .* \(p = .*, paired bootstrap, 1,000 .*\)", made.quote)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda b: b[:-1], {}, DataError, "not outputs for the same prompts and targets"),
        (lambda b: [row | {"target": None} for row in b], {}, DataError, "not outputs for the same"),
        (lambda b: [row | {"output": None} for row in b], {}, DataError, "holds no outputs"),
        (lambda b: [row | {"target": 5} for row in b], {}, DataError, "holds no outputs"),
        (lambda b: [{"text": "x"}], {}, DataError, "holds no outputs; make them with `ketchup-cache evaluate"),
        (lambda b: b, {"metrics": "bleu,loss"}, ConfigError, "comes by itself"),
        (lambda b: b, {"metrics": "accuracy"}, DataError, "no final answer"),
    ],
)
def test_what_can_not_be_compared_is_refused(tmp_path, change, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, rows(1, 0.5), change(rows(2, 0.5)), **options)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="nowhere: can't be read"):
        compare(CompareConfig(a=tmp_path / "nowhere", b=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"is a folder; of a run, compare its outputs-best\.jsonl"):
        compare(CompareConfig(a=tmp_path, b=tmp_path))


def test_line_separators_inside_a_text_are_part_of_it(tmp_path):
    made = [row | {"prompt": "a\u2028b\x85c"} for row in rows(1, 0.5)]
    (tmp_path / "a").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    assert compare(CompareConfig(a=tmp_path / "a", b=tmp_path / "a")).examples == 60


def test_too_few_examples_and_a_seed_that_is_none_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="9 examples tell nothing; compare at least 10"):
        run(tmp_path, rows(1, 0.5, 9), rows(2, 0.5, 9))
    monkeypatch.setenv("SACREBLEU_SEED", "none")
    with pytest.raises(ConfigError, match="SACREBLEU_SEED must be a whole number"):
        run(tmp_path, rows(1, 0.5), rows(2, 0.5))
