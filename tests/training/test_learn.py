"""Runs of the learner: the order of its data, what it warns of and refuses, and that it survives being killed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ketchup_cache.errors import CacheError, ConfigError, MismatchError, NumericsError, WriteError
from ketchup_cache.models.head import Head
from ketchup_cache.training.batches import plan_batches
from ketchup_cache.training.learn import learn
from ketchup_cache.training.records import sealed, unsealed
from tests.helpers.caches import make_cache
from tests.helpers.learning import assert_same_weights, config, metrics, whole_batch
from tests.helpers.models import WORDS, make_t5, make_tokenizer, save_model
from tests.helpers.trust import kill_once


@pytest.fixture
def cache(tmp_path, folders):
    return make_cache(tmp_path / "cache", *folders, forced=True, stale=0.7)


def test_every_epoch_visits_every_rollout_once_and_keeps_samples_together(tmp_path, folders):
    cache = make_cache(tmp_path / "cache", *folders, prompts=10, samples=2, segments=3)
    refs = cache.scored()
    assert len(refs) == 3
    plan = plan_batches(refs, 4, seed=5)
    epochs = []
    for _ in range(3):
        seen = []
        for _ in range(5):  # 20 rollouts in batches of 4
            batch = [(part, int(row)) for part, rows in next(plan) for row in rows]
            assert len(batch) == 4
            pairs = [(part, row // 2) for part, row in batch]
            assert pairs[0::2] == pairs[1::2]
            seen += batch
        assert len(set(seen)) == 20
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_killed_and_resumed_gives_the_same_bits(cache, tmp_path, folders):
    """kill -9 after some checkpoint; the second run goes on from it to the weights of an undisturbed one."""
    options = config(tmp_path, folders, steps=40, checkpoint_every=3, k=2, warmup=5, schedule="linear")
    undisturbed = options.model_copy(update={"out": tmp_path / "undisturbed"})
    report = learn(undisturbed)
    assert report.resumed_from == 0

    assert kill_once(lambda: learn(options), lambda: list((options.out / "checkpoints").glob("step-????????")))
    assert not (options.out / "last").exists()
    resumed = learn(options)
    assert 0 < resumed.resumed_from < 40
    assert_same_weights(undisturbed.out, options.out)
    assert [line["step"] for line in metrics(options.out)] == list(range(40))
    again = learn(options)
    assert again.already_done
    assert "nothing to do" in str(again)


def test_each_warning_is_printed_once(cache, tmp_path, folders, capsys, monkeypatch):
    # some of the made-up student's rollouts are cut
    monkeypatch.setattr("ketchup_cache.training.alarms.OFTEN_CUT", 0.01)
    learn(config(tmp_path, folders, k=50, unfinished="drop", batch_size=len(whole_batch(cache))))
    printed = capsys.readouterr().err
    assert printed.count("--tail jump") == printed.count("--unfinished bootstrap") == 1


def test_result_is_loadable_and_moved(cache, tmp_path, folders):
    options = config(tmp_path, folders, k=2)
    report = learn(options)
    student = AutoModelForSeq2SeqLM.from_pretrained(options.out / "last")
    assert AutoTokenizer.from_pretrained(options.out / "last")("the cat")["input_ids"] == [3, 5, 1]
    before = make_t5("1.0", seed=1).state_dict()
    assert not torch.equal(student.state_dict()["shared.weight"], before["shared.weight"])
    record = json.loads((options.out / "config.json").read_text())
    assert record["options"]["k"] == 2
    assert record["resolved"]["segments"] == [ref.scores_id for ref in cache.scored()]
    assert report.steps == 3


def test_offline_learning_never_sees_the_teacher(cache, tmp_path, folders):
    """No teacher module is imported, and nothing of the teacher's is opened: its folder is gone."""
    flags = ["learn", "--student", str(folders[0]), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "x")]
    code = f"""
import gc, sys
from torch.nn import Module
from ketchup_cache.cli import main
assert main({[*flags, "--steps", "2", "--batch-size", "4"]!r}) == 0
assert not {{"ketchup_cache.scoring.teacher", "ketchup_cache.scoring.score"}} & set(sys.modules), sorted(sys.modules)
whole = [o for o in gc.get_objects() if isinstance(o, Module) and type(o).__name__ == "T5ForConditionalGeneration"]
assert len(whole) <= 1
"""
    hidden = folders[1].with_name("hidden")
    folders[1].rename(hidden)
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    finally:
        hidden.rename(folders[1])
    assert done.returncode == 0, done.stderr


def test_another_runs_folder_is_refused_unless_an_earlier_version_left_new_options_at_their_defaults(
    cache, tmp_path, folders
):
    options = config(tmp_path, folders)
    learn(options)
    with pytest.raises(ConfigError, match="--k 4, not 2: repeat its options"):
        learn(config(tmp_path, folders, k=2))
    written = options.out / "config.json"
    record = unsealed(written)
    assert {record["options"].pop("reuse"), record["options"].pop("precision")} == {1, "float32"}
    written.write_bytes(sealed(record))
    learn(options)
    with pytest.raises(ConfigError, match="--precision None, not bfloat16"):
        learn(config(tmp_path, folders, precision="bfloat16"))
    del record["options"]["student"]  # has no default
    written.write_bytes(sealed(record))
    with pytest.raises(ConfigError, match="--student None"):
        learn(options)


def test_two_at_once_in_one_folder(cache, tmp_path, folders):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            learn(config(tmp_path, folders))


def test_nan_is_refused_and_keeps_what_was_written_and_a_broken_checkpoint_is_named(
    cache, tmp_path, folders, monkeypatch
):
    options = config(tmp_path, folders, steps=6, checkpoint_every=2)
    original, calls = Head.log_prob, []

    def log_prob(self, states, targets, **keywords):
        calls.append(1)
        out = original(self, states, targets, **keywords)
        return out * float("nan") if len(calls) == 5 else out  # the first is of the fixed rollouts

    monkeypatch.setattr(Head, "log_prob", log_prob)
    with pytest.raises(NumericsError, match="step 3: the loss is nan"):
        learn(options)
    assert [p.name for p in (options.out / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(metrics(options.out)) == 3
    (options.out / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(WriteError, match="step-00000002: damaged checkpoint"):
        learn(options)


def test_other_tokenizer_and_empty_cache_are_refused(cache, tmp_path, folders):
    other = save_model(tmp_path / "other", "1.0", seed=1)
    make_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(other)
    with pytest.raises(MismatchError, match="encode differently"):
        learn(config(tmp_path, (other, folders[1])))
    with pytest.raises(CacheError, match="nobody"):
        learn(config(tmp_path, folders, policy="nobody"))
