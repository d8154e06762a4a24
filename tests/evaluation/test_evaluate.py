"""`evaluate` against plain generation and plain forward passes, one example at a time."""

from __future__ import annotations

import gc
import json
import statistics
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ketchup_cache.config.commands import EvaluateConfig
from ketchup_cache.errors import DataError, MismatchError, WriteError
from ketchup_cache.evaluation import evaluate as module
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.scoring.teacher import Teacher
from tests.helpers.models import WORDS, make_tokenizer, save_model, write_prompts
from tests.helpers.oracle import plain_logits

LONGEST = 12
VOCABULARY = len(WORDS) + 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of which some outputs end by themselves, a teacher with padding rows in its head, and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_model(folder / "student", "1.1", seed=7)
    save_model(folder / "teacher", "1.1", seed=5, vocab_size=VOCABULARY + 6)
    write_prompts(folder / "data.jsonl", 12)
    return folder


def run(place: Path, **options):
    given = {"model": str(place / "student"), "data": str(place / "data.jsonl"), "max_new_tokens": LONGEST}
    return evaluate(EvaluateConfig(**{**given, **options}))


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(place: Path, name: str):
    """The model by transformers, and the token ids of each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(place / name)
    prompts = [tokenizer(row["prompt"]).input_ids for row in records(place / "data.jsonl")]
    return AutoModelForSeq2SeqLM.from_pretrained(place / name), prompts


@pytest.fixture(scope="module")
def plain(place: Path) -> list[list[int]]:
    """Greedy completions by transformers, one prompt at a time, cut after EOS."""
    model, prompts = loaded(place, "student")
    options = {"do_sample": False, "max_new_tokens": LONGEST}
    completions = [model.generate(torch.tensor([ids]), **options)[0, 1:].tolist() for ids in prompts]
    assert {completion[-1] == 1 for completion in completions} == {True, False}
    return completions


def test_outputs_are_the_greedy_ones_with_their_lengths(place: Path, plain: list[list[int]], tmp_path: Path):
    result = run(place, outputs=tmp_path / "new" / "outputs.jsonl", rollout_batch=5)
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    data = records(place / "data.jsonl")
    written = records(tmp_path / "new" / "outputs.jsonl")
    assert [w["output"] for w in written] == [tokenizer.decode(c, skip_special_tokens=True) for c in plain]
    assert [(w["prompt"], w["target"]) for w in written] == [(row["prompt"], row["target"]) for row in data]
    assert [w["finished"] for w in written] == [c[-1] == 1 for c in plain]
    lengths = [len(c) for c in plain]
    wanted = (statistics.fmean(lengths), statistics.stdev(lengths), statistics.fmean(c[-1] == 1 for c in plain))
    assert (result.length_mean, result.length_sd, result.finished) == pytest.approx(wanted)
    assert (result.examples, result.returns) == (12, None)


def test_metrics_are_of_outputs_against_their_own_targets(place: Path, tmp_path: Path):
    run(place, outputs=tmp_path / "outputs.jsonl")
    outputs = records(tmp_path / "outputs.jsonl")
    answers = [{"prompt": o["prompt"], "target": o["output"] if i % 3 else "no"} for i, o in enumerate(outputs)]
    result = run(place, data=write_data(tmp_path / "own.jsonl", answers), metrics="exact,chrf")
    assert list(result.metrics) == ["exact", "chrf", "chrf_signature"]
    assert result.metrics["exact"] == pytest.approx(100 * 8 / 12)


def test_rouge_knows_the_letters_of_the_references(place: Path, tmp_path: Path):
    data = write_data(tmp_path / "d.jsonl", [{"prompt": "the cat", "target": "Москва"}])
    assert "of any script" in run(place, data=data, metrics="rouge1").metrics["rouge_variant"]
    with pytest.raises(DataError, match="ascii loses 100% of the letters"):
        run(place, data=data, metrics="rouge", rouge_tokenizer="ascii")


def one_step_return(model, prompt: list[int], completion: list[int]) -> float:
    """Σ r_t of Eq. 10 on log-probabilities; a cut output keeps the value of the state it was cut in."""
    logprob = plain_logits(model, prompt, completion)[:, :VOCABULARY].double().log_softmax(-1)
    # the value after EOS is 0; after a cut m_{T+1} is subtracted and bootstrapped back
    return float(logprob[range(len(completion)), completion].sum() - logprob[1:].max(-1).values.sum())


def test_mean_return_equals_plain_forward_passes(place: Path, plain: list[list[int]], tmp_path: Path):
    model, prompts = loaded(place, "teacher")
    expected = [one_step_return(model, p, c) for p, c in zip(prompts, plain, strict=True)]
    done = [r for r, c in zip(expected, plain, strict=True) if c[-1] == 1]
    result = run(place, teacher=str(place / "teacher"), batch_tokens=64, outputs=tmp_path / "o.jsonl")
    r, spread = result.returns, statistics.stdev(expected)
    written = records(tmp_path / "o.jsonl")
    assert [row["return"] for row in written] == pytest.approx(expected, abs=1e-4)
    assert {row["return_of"] for row in written} == {f"G_1, logprob, teacher {r.fingerprint:.12}"}
    wanted = (statistics.fmean(expected), spread, spread / 12**0.5, statistics.fmean(done))
    assert (r.mean, r.sd, r.se, r.mean_finished) == pytest.approx(wanted, abs=1e-4)
    assert "(at most: unfinished outputs count up to the cut)" in str(result)


def test_a_model_judged_by_itself_pays_no_gap_and_the_normalisation_is_the_chosen_one(place: Path):
    """Greedy outputs are the teacher's own choices, so G_1 is the largest (normalised) logit in the first state."""
    model, prompts = loaded(place, "student")
    first = [plain_logits(model, ids, [1])[0] for ids in prompts]
    for normalization, best in (("raw", first), ("logprob", [logits.log_softmax(-1) for logits in first])):
        result = run(place, teacher=str(place / "student"), normalization=normalization).returns
        assert result.mean == pytest.approx(statistics.fmean(float(logits.max()) for logits in best), abs=1e-4)
        assert result.normalization == normalization


def test_what_can_not_be_used_is_refused_before_anything_is_decoded(place: Path, tmp_path: Path, monkeypatch):
    def decoded(*args, **options):
        raise AssertionError("decoded before the mistake was found")

    monkeypatch.setattr(module.Outputs, "of", decoded)
    save_model(tmp_path / "teacher", "1.1")
    make_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(tmp_path / "teacher")
    rows = records(place / "data.jsonl")
    del rows[4]["target"]
    refusals = (
        (MismatchError, r"encodes differently from that of model .*: id 3 is .*; choose a teacher that shares",
         {"teacher": str(tmp_path / "teacher")}),
        (DataError, r"d\.jsonl: row 5: no text in 'target', but other rows have some",
         {"data": write_data(tmp_path / "d.jsonl", rows)}),
        (DataError, "target of example 1 has no final answer", {"metrics": "exact,gsm8k"}),
    )  # fmt: skip
    for error, message, options in refusals:
        with pytest.raises(error, match=message):
            run(place, **options)


def test_the_student_is_gone_before_the_teacher_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch):
    students, alive = [], []
    load_model, load_teacher = module.load_model, Teacher.load

    def watch(*args, **options):
        model = load_model(*args, **options)
        students.append(weakref.ref(model))
        return model

    def check(*args, **options):
        alive.extend(student() is not None for student in students)
        return load_teacher(*args, **options)

    monkeypatch.setattr(module, "load_model", watch)
    monkeypatch.setattr(Teacher, "load", check)
    gc.disable()  # it must not be luck
    try:
        run(place, teacher=str(place / "teacher"))
    finally:
        gc.enable()
    assert alive == [False]


def test_without_targets_only_lengths_and_returns(place: Path, tmp_path: Path):
    data = write_data(tmp_path / "d.jsonl", [{"prompt": row["prompt"]} for row in records(place / "data.jsonl")])
    result = run(place, data=data, teacher=str(place / "teacher"), outputs=tmp_path / "o.jsonl", limit=1)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (values["examples"], values["metrics"]) == (1, None)
    assert (values["length_sd"], values["returns"]["se"]) == (None, None)  # one output has no spread
    assert values["returns"]["mean"] == result.returns.mean < 0
    assert "the data has no targets (see --target-field)" in str(result)
    assert {w["target"] for w in records(tmp_path / "o.jsonl")} == {None}


def test_examples_over_the_prompt_limit_are_counted_and_the_others_stay_aligned(place: Path, tmp_path: Path):
    result = run(place, outputs=tmp_path / "o.jsonl", max_prompt_tokens=6, long_prompts="drop")
    short = [row for row in records(place / "data.jsonl") if len(row["prompt"].split()) + 1 <= 6]
    assert (result.examples, result.left_out) == (len(short), 12 - len(short))
    assert 0 < len(short) < 12
    assert [(w["prompt"], w["target"]) for w in records(tmp_path / "o.jsonl")] == [
        (row["prompt"], row["target"]) for row in short
    ]
    assert f"({12 - len(short)} left out)" in str(result)


def test_outputs_that_can_not_be_written_are_one_line_and_leave_nothing(place: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="can't be written") as caught:
        run(place, outputs=tmp_path / "file" / "outputs.jsonl")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
