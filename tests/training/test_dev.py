"""The dev set: the best model is kept, by the numbers of `evaluate`, whenever the run was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache.config.commands import EvaluateConfig, LearnConfig, PretrainConfig, RolloutConfig, ScoreConfig
from ketchup_cache.errors import ConfigError, DataError, MismatchError, ModelError, WriteError
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.folders import resolve_folder
from ketchup_cache.models.origin import read_origin
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.training.learn import learn
from ketchup_cache.training.pretrain import pretrain
from ketchup_cache.training.run import Callback
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import assert_same_weights, config as learn_config, killed_before, metrics
from tests.helpers.models import VOCAB, make_tokenizer, write_prompts
from tests.helpers.oracle import plain_logits
from tests.helpers.trust import kill_once

LONGEST = 6


@pytest.fixture
def data(tmp_path):
    return write_prompts(tmp_path / "dev.jsonl", 7, seed=3)


@pytest.fixture
def options(tmp_path, folders, data):
    """A way to make options of `learn` with a dev set, on a cache of made-up rollouts."""
    make_cache(tmp_path / "cache", *folders)
    given = {"eval_data": str(data), "eval_every": 2, "metric": "chrf", "max_new_tokens": LONGEST, "steps": 6, "k": 2}
    return lambda **other: learn_config(tmp_path, folders, **(given | other))


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "dev.jsonl").read_text().splitlines()]


def timeless(run) -> list[dict]:
    return [record | {"seconds": 0} for record in records(run)]


def test_values_are_those_of_evaluate(options, folders, data, capsys):
    """For the start, and for the model of the last step."""
    config = options(metric="chrf,exact,loss,return", teacher=str(folders[1]), refresh_every=2, batch_size=4)
    report = learn(config)
    first, last = records(config.out)[0], records(config.out)[-1]
    assert [record["step"] for record in records(config.out)] == [0, 2, 4, 6]
    for record, model in ((first, folders[0]), (last, config.out / "last")):
        asked = {"model": str(model), "data": str(data), "max_new_tokens": LONGEST, "device": "cpu"}
        asked["outputs"] = config.out.parent / "outputs.jsonl"
        theirs = evaluate(EvaluateConfig(**asked, metrics="chrf,exact,loss", teacher=str(folders[1])))
        written = [(config.out / f"outputs-{name}.jsonl").read_bytes() for name in ("start", "best")]
        if record is first or record["best"]:
            assert asked["outputs"].read_bytes() == written[record is not first]
        values = {name: theirs.metrics[name] for name in ("chrf", "exact", "loss")} | {"return": theirs.returns.mean}
        assert record["metrics"] == pytest.approx(values, abs=2e-5)
        assert (record["length_mean"], record["finished"]) == pytest.approx((theirs.length_mean, theirs.finished))
    said = re.findall(r"ketchup-cache: step (\d+): chrf ([\d.]+), .* on the dev set(.*)", capsys.readouterr().err)
    shown = [(str(r["step"]), f"{r['metrics']['chrf']:.2f}", r["step"] > 0 and r["best"]) for r in records(config.out)]
    assert [(step, value, bool(best)) for step, value, best in said] == shown
    assert report.dev["start"] == first
    assert report.dev["best"]["variants"]["chrf_signature"].startswith("nrefs:1")
    assert report.eval_s == pytest.approx(sum(record["seconds"] for record in records(config.out)), abs=1e-3)


def test_loss_entropy_and_kl_equal_plain_forward_passes(options, folders, data):
    config = options(metric="loss", lr=3e-3)
    learn(config)
    encode = make_tokenizer()
    start, last = (AutoModelForSeq2SeqLM.from_pretrained(f).eval() for f in (folders[0], config.out / "last"))
    nll, entropy, kl = [], [], []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt, target = (encode(row[part])["input_ids"] for part in ("prompt", "target"))
        logprob = plain_logits(last, prompt, target)[:, :VOCAB].double().log_softmax(1)
        nll += (-logprob[range(len(target)), target]).tolist()
        output = last.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LONGEST)[0, 1:].tolist()
        mine, first = (plain_logits(m, prompt, output)[:, :VOCAB].double().log_softmax(1) for m in (last, start))
        entropy += (-(mine.exp() * mine).sum(1)).tolist()
        kl += (mine.exp() * (mine - first)).sum(1).tolist()
    record = records(config.out)[-1]
    found = record["metrics"]["loss"], record["entropy"], record["kl_start"]
    assert found == pytest.approx((np.mean(nll), np.mean(entropy), np.mean(kl)), rel=1e-4)
    assert records(config.out)[0]["kl_start"] == 0
    assert record["kl_start"] > 1e-3


def test_the_best_is_kept_and_the_start_is_a_candidate(options, folders):
    """Learning at a rate that ruins the student leaves the start, and says so."""
    config = options(lr=1.0, metric="loss")
    report = learn(config)
    assert [record["best"] for record in records(config.out)] == [True, False, False, False]
    assert weights_fingerprint(config.out / "best") == weights_fingerprint(resolve_folder(str(folders[0])))
    assert weights_fingerprint(config.out / "last") == report.fingerprint
    assert "the best on the dev set is the start (loss" in str(report)
    assert (read_origin(str(config.out / "best")).step, read_origin(str(config.out / "last")).step) == (0, 6)


def test_of_a_metric_that_rises_the_best_is_the_largest(options, monkeypatch):
    """A function of the user's; of equal values the first wins."""
    values = iter([2.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr("tests.training.test_dev.next_value", lambda: next(values), raising=False)
    config = options(metric="tests.training.test_dev:own")
    report = learn(config)
    assert [record["best"] for record in records(config.out)] == [True, False, True, False]
    assert read_origin(str(config.out / "best")).metrics == {"tests.training.test_dev:own": 3.0}
    assert "2.00 → 3.00 at step 4, last 3.00" in str(report)


def own(outputs: list[str], targets: list[str]) -> float:
    assert len(outputs) == len(targets) == 7
    return globals()["next_value"]()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5])
def test_killed_at_any_step_it_ends_with_the_same_best(options, tmp_path, step):
    whole = options(metric="loss", lr=3e-3, patience=3)
    if not whole.out.with_name("whole").exists():
        learn(whole.model_copy(update={"out": tmp_path / "whole"}))
    with killed_before(step):
        learn(whole)
    learn(whole)
    assert timeless(whole.out) == timeless(tmp_path / "whole")
    for name in ("best", "last"):
        assert_same_weights(tmp_path / "whole", whole.out, name)
        outputs = [(run / "outputs-best.jsonl").read_bytes() for run in (whole.out, tmp_path / "whole")]
        assert outputs[0] == outputs[1]
        one, other = ((run / name / "ketchup-cache-origin.json").read_text() for run in (whole.out, tmp_path / "whole"))
        assert one == other


def test_killed_by_the_system_while_it_evaluates(options, tmp_path):
    """kill -9 as soon as a first evaluation is written: the best model stands beside it."""
    whole = options(metric="loss", lr=3e-3, steps=30, checkpoint_every=7)
    learn(whole.model_copy(update={"out": tmp_path / "whole"}))
    assert kill_once(lambda: learn(whole), (whole.out / "dev.jsonl").exists)
    assert (whole.out / "best" / "model.safetensors").exists()
    learn(whole)
    assert timeless(whole.out) == timeless(tmp_path / "whole")
    for name in ("best", "last"):
        assert_same_weights(tmp_path / "whole", whole.out, name)


def test_patience_ends_a_run_that_gets_no_better(options):
    config = options(lr=1.0, metric="loss", steps=40, patience=2)
    report = learn(config)
    assert (report.steps, report.stopped) == (4, "patience")
    assert str(report).startswith("4 steps in")
    assert "stopped early" in str(report)
    assert learn(config).already_done


def test_a_lengthened_run_is_the_long_run(options, tmp_path):
    """Also a finished one. At a rate that depends on the number of steps, it is said."""
    long = options(steps=9, out=tmp_path / "long", metric="loss")
    learn(long)
    learn(options(steps=4, metric="loss"))
    report = learn(options(steps=9, metric="loss"))
    assert report.resumed_from == 4
    for name in ("best", "last"):
        assert_same_weights(tmp_path / "long", report_folder(report), name)
    with pytest.raises(ConfigError, match=r"has taken 9 steps, more than 5.*lengthened only"):
        learn(options(steps=5, metric="loss"))


def report_folder(report):
    return resolve_folder(report.student).parent


def test_a_lengthened_run_says_what_is_not_as_in_a_long_one(options, capsys):
    learn(options(steps=2, schedule="cosine"))
    learn(options(steps=4, schedule="cosine"))
    assert "the 2 steps taken had the learning rates of a run of 2 steps" in capsys.readouterr().err
    learn(options(steps=2, save_limit=0, out=options().out.with_name("none")))
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        learn(options(steps=4, save_limit=0, out=options().out.with_name("none")))


def test_without_a_dev_set_the_best_is_the_last(options):
    dev = {"eval_data", "eval_every", "metric"}
    config = LearnConfig(**options().model_dump(exclude=dev, exclude_unset=True))
    report = learn(config)
    assert weights_fingerprint(config.out / "best") == report.fingerprint
    assert os.readlink(config.out / "best") == "last"
    assert not (config.out / "dev.jsonl").exists()


class Watch(Callback):
    def __init__(self, stop_after: int) -> None:
        self.seen, self.stop_after = [], stop_after

    def on_step(self, run, metrics):
        self.seen.append(("step", metrics["step"]))
        if len([kind for kind, _ in self.seen if kind == "step"]) == self.stop_after:
            run.stop()

    def on_refresh(self, run, step, samples):
        assert [row["prompt"] for row in samples]
        self.seen.append(("refresh", step))

    def on_evaluation(self, run, record):
        self.seen.append(("dev", record["step"]))

    def on_end(self, run, report):
        self.seen.append(("end", report["steps"]))


def test_callbacks_see_a_run_and_stop_it(options):
    watch = Watch(stop_after=3)
    report = learn(options(), callbacks=[watch])
    assert watch.seen == [("dev", 0), ("refresh", 0), ("step", 0), ("step", 1), ("dev", 2), ("step", 2), ("end", 3)]
    assert (report.steps, report.stopped) == (3, "callback")


def test_interrupted_it_saves_and_goes_on_to_the_same_bits(options, tmp_path, capsys):
    """As by Ctrl-C, between two checkpoints."""

    class Interrupt(Callback):
        def on_step(self, run, metrics):
            if metrics["step"] == 2:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    learn(options(out=tmp_path / "whole", checkpoint_every=100))
    with pytest.raises(KeyboardInterrupt):
        learn(options(checkpoint_every=100), callbacks=[Interrupt()])
    assert "saved after step 3 of 6" in capsys.readouterr().err
    report = learn(options(checkpoint_every=100))
    assert report.resumed_from == 3
    assert_same_weights(tmp_path / "whole", report_folder(report), "last")
    assert signal.getsignal(signal.SIGINT) is before


def test_pretrain_keeps_the_best_too(tmp_path, folders, data):
    train = str(write_prompts(tmp_path / "train.jsonl", 12, seed=5))
    given = {"model": str(folders[0]), "data": train, "epochs": 4, "batch_size": 4, "lr": 3e-3, "device": "cpu"}
    given |= {"eval_data": str(data), "metric": "loss", "eval_every": 3, "max_new_tokens": LONGEST}
    whole, killed = (PretrainConfig(**given, out=tmp_path / name) for name in ("whole", "run"))
    report = pretrain(whole)
    with killed_before(7):
        pretrain(killed)
    pretrain(killed)
    assert timeless(killed.out) == timeless(whole.out)
    assert_same_weights(whole.out, killed.out, "best")
    assert report.dev["best"]["metrics"]["loss"] == min(r["metrics"]["loss"] for r in records(whole.out))
    assert "loss on the dev set" in str(report)


def test_the_form_of_the_prompts_is_remembered(tmp_path, folders, data, capsys):
    train, template = str(write_prompts(tmp_path / "train.jsonl", 8, seed=5)), "the cat {prompt}"
    given = {"model": str(folders[0]), "data": train, "epochs": 1, "out": tmp_path / "run", "device": "cpu"}
    pretrain(PretrainConfig(**given, template=template))
    asked = {"model": str(tmp_path / "run" / "best"), "data": str(data), "device": "cpu", "max_new_tokens": LONGEST}
    outputs = tmp_path / "o.jsonl"
    evaluate(EvaluateConfig(**asked, outputs=outputs))
    first = json.loads(outputs.read_text().splitlines()[0])["prompt"]
    assert first == "the cat " + json.loads(data.read_text().splitlines()[0])["prompt"]
    assert "was trained with" not in capsys.readouterr().err
    evaluate(EvaluateConfig(**asked, template="{prompt} .", outputs=outputs))
    assert "warning: " + asked["model"] + ": was trained with --template 'the cat {prompt}', not '{prompt} .'" in (
        capsys.readouterr().err
    )
    assert json.loads(outputs.read_text().splitlines()[0])["prompt"].endswith(" .")
    # nor is another tokenizer, or a damaged record, taken for the one of its training
    (best := tmp_path / "run" / "best" / "tokenizer.json").write_text(
        best.read_text().replace('"cat":', '"dog?":').replace('"dog":', '"cat":').replace('"dog?":', '"dog":')
    )
    refuses(MismatchError, "its tokenizer is not the one that it was trained with", evaluate, EvaluateConfig(**asked))
    best.with_name("ketchup-cache-origin.json").write_text("{}}")
    refuses(ModelError, "origin.json: can't be used", evaluate, EvaluateConfig(**asked))


def test_a_run_is_no_model_and_its_old_name_is_known_for_a_release(options, capsys):
    report = learn(options())
    run = report_folder(report)
    data, cache = options().eval_data, options().cache
    for words in (
        ("rollout", "--data", data, "--cache", cache, "--student"),
        ("score", "--cache", cache, "--teacher"),
        ("pretrain", "--cache", cache, "--out", run.parent / "p", "--model"),
        ("learn", "--cache", cache, "--out", run.parent / "l", "--student"),
        ("learn", "--cache", cache, "--out", run.parent / "l", "--student", run / "best", "--teacher"),
        ("evaluate", "--data", data, "--model"),
        ("evaluate", "--data", data, "--model", run / "best", "--teacher"),
        ("analyze", "--cache", cache, "--gradient", "--student"),
    ):
        assert f"{run}: is the folder of a run of `pretrain` or `learn`; its model is {run}/best" in fails(
            capsys, *words, run
        )
    shutil.copytree(run, early := run.parent / "early", ignore=shutil.ignore_patterns("best", "last", "report.json"))
    assert "without a model yet" in fails(capsys, "evaluate", "--data", data, "--model", early)
    assert resolve_folder(str(run / "student")) == run / "best"
    assert "run/best now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "bleu"}, "metric is about the dev set: give --eval-data too"),
        ({"eval_data": "d", "metric": "rouge"}, "choose rouge1, rouge2 or rougeL"),
        ({"eval_data": "d", "metric": "return"}, "metric return needs `learn --teacher`"),
        ({"eval_data": "d", "metric": "blue"}, "knows no metric 'blue'"),
        ({"eval_data": "d", "metric": ""}, "at least 1 item"),
    ],
)
def test_options_that_can_not_be_meant_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        LearnConfig(student="s", cache="c", **given)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("no.such:thing", ConfigError, "no.such:thing: can't be imported"),
        ("tests.training.test_dev:raises", DataError, "tests.training.test_dev:raises: not today"),
        ("tests.training.test_dev:not_a_number", DataError, "gives nan"),
        ("accuracy", DataError, "no final answer"),
    ],
)
def test_a_metric_that_can_not_be_had_is_one_line(options, metric, error, message):
    with pytest.raises(error, match=message):
        learn(options(metric=metric))
    assert metrics(options().out) == [] if (options().out / "metrics.jsonl").exists() else True


def test_the_tokenizer_of_rouge_is_the_one_asked_for(options):
    report = learn(options(metric="rouge1", rouge_tokenizer="characters", steps=1))
    assert "single letters" in report.dev["best"]["variants"]["rouge_variant"]


def raises(outputs, targets):
    raise RuntimeError("not today")


def not_a_number(outputs, targets):
    return float("nan")


def test_a_dev_set_needs_references(options, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "the cat"}\n')
    with pytest.raises(DataError, match=r"bare\.jsonl: has no references"):
        learn(options(eval_data=str(tmp_path / "bare.jsonl")))


def test_what_the_dev_set_found_is_part_of_the_run(options, tmp_path):
    """A lost or edited dev.jsonl, or best/, is no basis to go on from; a run that began can always begin again."""
    config = options(metric="loss", lr=3e-3)
    learn(config)
    kept = tmp_path / "kept"
    shutil.copytree(config.out, kept, symlinks=True)

    def again(change, **other):
        shutil.rmtree(config.out)
        shutil.copytree(kept, config.out, symlinks=True)
        change(config.out)
        with pytest.raises((WriteError, ConfigError)) as caught:
            learn(options(metric="loss", lr=3e-3, **other))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit(run):
        text = (run / "dev.jsonl").read_text()
        (run / "dev.jsonl").write_text(text.replace('"loss":', '"loss":1', 1))

    def garble(run):
        (run / "dev.jsonl").write_bytes(b"\xff\n")

    for change in (lambda run: (run / "dev.jsonl").unlink(), edit, garble):
        assert "dev.jsonl: is not as it was written up to step 6; bring it back" in again(change, steps=8)
    weights = Path("best", "model.safetensors")
    assert "is not the model of step" in again(lambda run: (run / weights).write_bytes(b""), steps=8)
    for steps in (6, 8):
        assert "best: is gone from a finished run" in again(lambda run: shutil.rmtree(run / "best"), steps=steps)
    # a damaged checkpoint leaves the finished run as it was
    again(lambda run: (run / "checkpoints" / "step-00000006" / "state.json").write_text("{}"), steps=8)
    assert learn(options(metric="loss", lr=3e-3)).already_done


def test_a_run_goes_on_in_another_place_and_is_evaluated_as_often(options, tmp_path):
    default = {"eval_every": 0, "metric": "loss"}
    learn(options(**default, steps=20))
    (tmp_path / "run").rename(tmp_path / "moved")
    learn(options(**default, steps=26, out=tmp_path / "moved"))
    assert [record["step"] for record in records(tmp_path / "moved")] == list(range(0, 27, 2))


class StopAtOnce(Callback):
    def on_evaluation(self, run, record):
        run.stop()


def test_a_run_that_is_stopped_at_its_start_has_a_report(options, tmp_path, folders, data):
    report = learn(options(), callbacks=[StopAtOnce()])
    assert (report.steps, report.first, report.stopped) == (0, {}, "callback")
    assert "nothing was learned" in str(report)
    given = {
        "model": str(folders[0]),
        "data": str(data),
        "out": tmp_path / "p",
        "eval_data": str(data),
        "device": "cpu",
    }
    report = pretrain(PretrainConfig(**given), callbacks=[StopAtOnce()])
    assert (report.steps, report.loss_first) == (0, None)
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_dev_set_has_the_form_of_the_prompts_that_are_learned(tmp_path, folders, data, capsys):
    """That of the cache, before what the student remembers; the trained student remembers it then."""
    common = {"device": "cpu", "max_new_tokens": LONGEST}
    train = str(write_prompts(tmp_path / "train.jsonl", 8, seed=5))
    given = {"model": str(folders[0]), "data": train, "epochs": 1, "template": "the {prompt}"}
    pretrain(PretrainConfig(**given, out=tmp_path / "p", **common))
    student, form = str(tmp_path / "p" / "best"), "two {prompt}"
    rollout(RolloutConfig(student=student, data=train, cache=tmp_path / "c", template=form, samples=2, **common))
    score(ScoreConfig(teacher=str(folders[1]), cache=tmp_path / "c", device="cpu"))
    given = {"student": student, "cache": tmp_path / "c", "steps": 2, "batch_size": 4, "eval_data": str(data), **common}
    learn(LearnConfig(**given, metric="chrf", out=tmp_path / "run"))
    assert "was trained with prompts of another form (--template 'the {prompt}'), these" in capsys.readouterr().err
    asked = {"data": str(data), "metrics": "chrf", **common}
    last = evaluate(EvaluateConfig(model=str(tmp_path / "run" / "last"), **asked))
    assert records(tmp_path / "run")[-1]["metrics"]["chrf"] == pytest.approx(last.metrics["chrf"], abs=1e-5)
    assert read_origin(str(tmp_path / "run" / "last")).prompts.template == form
