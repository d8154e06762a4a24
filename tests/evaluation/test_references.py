"""Several references: every metric against its rule, from the data to `evaluate`, the outputs and `compare`."""

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf, corpus_ter

from ketchup_cache.config.commands import CompareConfig, EvaluateConfig
from ketchup_cache.config.options import DataOptions
from ketchup_cache.errors import DataError
from ketchup_cache.evaluation.compare import compare
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.evaluation.task_metrics import compute, rouge_tokenizer
from ketchup_cache.text.read import read_examples
from tests.helpers.errors import refuses
from tests.helpers.models import save_model

SCITLDR = Path(__file__).resolve().parents[3] / "shared" / "data" / "scitldr" / "test.jsonl"
OUTPUTS = ["the cat sat on a mat", "two dogs run"]
TARGETS = [["a dog sat", "the cat sat on the mat"], ["two dogs run", "dogs", "two cats run"]]


def own(outputs, targets):
    return float(sum(output in several for output, several in zip(outputs, targets, strict=True)))


def test_each_metric_by_its_rule():
    """rouge: the best of each example. bleu, chrf, ter: sacrebleu's, where a reference twice counts as once (for ter,
    whose length is the mean over references, the counts are made equal). exact, accuracy: any."""
    metrics = ["rouge", "bleu", "chrf", "exact", "tests.evaluation.test_references:own"]
    found = compute(metrics, OUTPUTS, TARGETS)
    # 5 of 6 words agree; 3 of 5 bigrams; 5 of 6 in order; the second is right
    assert [found[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([1100 / 12, 80, 1100 / 12])
    full = list(zip(*([*t, t[-1]][:3] for t in TARGETS), strict=True))
    assert found["bleu"] == pytest.approx(corpus_bleu(OUTPUTS, full).score)
    assert found["chrf"] == pytest.approx(corpus_chrf(OUTPUTS, full).score)
    assert found["bleu_signature"].startswith("nrefs:var|")
    equal = [several[:2] for several in TARGETS]
    ter = compute(["ter"], OUTPUTS, equal)["ter"]
    assert ter == pytest.approx(corpus_ter(OUTPUTS, list(zip(*equal, strict=True))).score) == pytest.approx(100 / 6.5)
    assert (found["exact"], found["tests.evaluation.test_references:own"]) == (50, 1)
    assert compute(["bleu"], OUTPUTS, [[t[0]] for t in TARGETS]) == compute(["bleu"], OUTPUTS, [t[0] for t in TARGETS])
    answers = [["#### 1", "#### 2"], ["#### 3", "so #### 1,000"], ["#### 5", "#### 6"]]
    assert compute(["accuracy"], ["#### 2", "#### 1000", "#### 4"], answers)["accuracy"] == pytest.approx(200 / 3)
    refuses(DataError, "example 1 has no final answer", compute, ["accuracy"], ["#### 2"], [["#### 2", "2"]])
    assert rouge_tokenizer(None, ["rouge1"], [["abc", "московский"]]) == "unicode"


def test_a_column_of_lists_from_the_data_to_the_outputs_and_to_compare(tmp_path, monkeypatch):
    model, data = save_model(tmp_path / "m", "1.1", seed=7), tmp_path / "d.jsonl"
    rows = [{"prompt": f"the cat {word}", "target": "two", "targets": ["two", f"dog {word}"]} for word in "0123456789"]
    rows[3]["targets"] = ["two"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(model), "data": str(data), "device": "cpu", "max_new_tokens": 4, "outputs": tmp_path / "a"}
    result = evaluate(EvaluateConfig(**given, metrics="chrf,exact"))
    written = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [row.get("targets", [row["target"]]) for row in written] == [row["targets"] for row in rows]
    chrf = compute(["chrf"], [row["output"] for row in written], [row["targets"] for row in rows])
    assert result.metrics["chrf"] == pytest.approx(chrf["chrf"])
    named = [{"prompt": row["prompt"], "refs": row["targets"]} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in named))
    again = evaluate(EvaluateConfig(**given, target_field="refs", metrics="chrf,exact"))
    assert again.metrics == result.metrics

    other = [row | {"output": row.get("targets", ["two"])[-1]} for row in written]
    (tmp_path / "b").write_text("".join(json.dumps(row) + "\n" for row in other))
    found = compare(CompareConfig(a=tmp_path / "a", b=tmp_path / "b", metrics="exact,bleu,chrf", resamples=50))
    exact, bleu, chrf = found.differences
    assert (exact.a, exact.b, chrf.a, chrf.b) == (result.metrics["exact"], 100, result.metrics["chrf"], 100)
    assert bleu.variant.startswith("nrefs:var|bs:50")
    (tmp_path / "b").write_text("".join(json.dumps(row | {"targets": ["two"]}) + "\n" for row in other))
    files = CompareConfig(a=tmp_path / "a", b=tmp_path / "b")
    refuses(DataError, "not outputs for the same prompts and targets", compare, files)
    (tmp_path / "b").write_text(json.dumps(other[0] | {"targets": "two"}) + "\n")
    refuses(DataError, "holds no outputs", compare, files)


@pytest.mark.skipif(not SCITLDR.is_file(), reason=f"no SciTLDR at {SCITLDR}")
def test_summaries_with_several_references():
    """Rouge against the plain maximum over the references."""
    examples = read_examples(DataOptions(data=str(SCITLDR), limit=60))
    lines = [json.loads(line) for line in SCITLDR.read_text(encoding="utf-8").split("\n")[:60]]
    assert [list(e.references) for e in examples] == [list(dict.fromkeys(line["targets"])) for line in lines]
    assert min(len(e.references) for e in examples) >= 2
    outputs, score = [e.prompt.split(". ")[0] for e in examples], RougeScorer(["rougeL"], use_stemmer=True).score
    best = [max(score(t, o)["rougeL"].fmeasure for t in e.references) for e, o in zip(examples, outputs, strict=True)]
    found = compute(["rougeL"], outputs, [e.references for e in examples])["rougeL"]
    assert found == pytest.approx(100 * sum(best) / 60)
