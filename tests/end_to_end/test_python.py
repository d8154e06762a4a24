"""The library from Python: rows, datasets, batches, rollouts and scores from elsewhere, and the examples."""

import runpy
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import ketchup_cache
from ketchup_cache import Collator, ScoredRows, add_rollouts, on_progress, open_cache, score_with, to_dataset
from ketchup_cache.errors import CacheError, DataError, NumericsError
from tests.helpers.caches import make_cache
from tests.helpers.errors import refuses
from tests.helpers.learning import learner_of, run
from tests.helpers.models import VOCAB, save_decoder, write_prompts
from tests.helpers.oracle import assert_same_gradients, plain_logits
from tests.helpers.returns import algorithm_1

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def cache(tmp_path_factory, folders):
    return make_cache(
        tmp_path_factory.mktemp("python") / "cache", *folders, prompts=9, segments=3, forced=True, stale=0.1
    )


def test_every_public_name_is_there_and_has_a_docstring():
    for name in ketchup_cache.__all__:
        assert getattr(ketchup_cache, name).__doc__, name
    assert set(ketchup_cache._HOME) | {"__version__"} == set(ketchup_cache.__all__)


def same(one, other) -> bool:
    return all(np.array_equal(a, vars(other)[name]) for name, a in vars(one).items() if name != "top")


def test_processes_and_workers_share_the_rows_and_every_epoch_has_its_order(cache):
    wanted = list(cache.rows())
    assert all(same(one, other) for one, other in zip(ScoredRows(cache.path), wanted, strict=True))

    def places(rows):
        return [next(i for i, true in enumerate(wanted) if same(row, true)) for row in rows]

    shuffled = ScoredRows(cache.path, seed=3)
    first = places(shuffled)
    assert sorted(first) == [*range(len(wanted))] != first
    assert places(shuffled) == first
    shuffled.epoch = 1
    assert sorted(second := places(shuffled)) == sorted(first)
    assert second != first
    parts = [places(ScoredRows(cache.path, seed=3, shard=(i, 3))) for i in range(3)]
    assert sorted(chain.from_iterable(parts)) == sorted(first)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    loader = DataLoader(ScoredRows(cache.path, seed=3, shard=(0, 2)), batch_size=None, num_workers=2)
    assert sorted(places(loader)) == sorted(places(ScoredRows(cache.path, seed=3, shard=(0, 2))))


@pytest.mark.parametrize("unfinished", ["bootstrap", "drop"])
def test_a_batch_holds_the_rows_and_the_returns_of_algorithm_1(cache, unfinished):
    rows = list(cache.rows())
    batch = Collator(k=2, unfinished=unfinished, clip_return=3.0, pad=7)(rows)
    for i, row in enumerate(rows):
        t, p = len(row.completion_tokens), len(row.prompt_tokens)
        assert batch["completion_ids"][i].tolist() == [*row.completion_tokens, *[7] * (batch["q"].shape[1] - t)]
        assert batch["prompt_ids"][i].tolist() == [*[7] * (batch["prompt_ids"].shape[1] - p), *row.prompt_tokens]
        front = batch["prompt_ids"].shape[1] - p
        assert batch["prompt_mask"][i].tolist() == [False] * front + [True] * p
        assert batch["completion_mask"][i].tolist() == [j < t for j in range(batch["q"].shape[1])]
        kept = row.finished or unfinished == "bootstrap"
        assert batch["in_loss"][i, :t].tolist() == [kept and not forced for forced in row.forced]
        returns = algorithm_1(list(row.q), list(row.max_q), 2) - row.logsumexp if kept else np.zeros(t)
        np.testing.assert_allclose(batch["returns"][i, :t], np.clip(returns, -3, 3), atol=1e-5)
        for name in ("q", "max_q", "behavior_logprob"):
            np.testing.assert_array_equal(batch[name][i, :t], getattr(row, name))
            assert not batch[name][i, t:].any()


def test_a_loop_of_ones_own_has_the_gradient_of_learn(cache, folders):
    """The loss of examples/own_loop.py without its baseline, against the optimizer step of `learn`."""
    from ketchup_cache.config.options import LossOptions
    from ketchup_cache.training.policy_gradient import policy_gradient_step

    (ref,) = cache.scored()[:1]
    batch, rows = cache.load_scored(ref), list(cache.rows())[: ref.rows]
    learner = learner_of(folders[0], LossOptions(k=3), VOCAB)
    policy_gradient_step(learner, batch, 0)
    wanted = learner.optimizer.gradient
    batch = Collator(k=3)(rows)
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[0]).eval()
    ids = batch["completion_ids"]
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    given = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"].long()}
    logits = model(**given, decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)).logits[..., :VOCAB]
    logprob = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ratio = ketchup_cache.importance_ratio(logprob, batch["behavior_logprob"], 2.0)
    inside = batch["in_loss"]
    loss = ketchup_cache.policy_gradient_loss(
        logprob[inside], batch["returns"][inside], ratio[inside], int(inside.sum())
    )
    loss.backward()
    assert_same_gradients(
        {name: parameter.grad for name, parameter in model.named_parameters()},
        {name: wanted[name] for name, _ in model.named_parameters()},
        1e-4,
    )


def test_a_dataset_has_the_columns_of_export_and_rows_without_scores_come_by_themselves(cache, tmp_path, folders):
    table = to_dataset(cache)
    rows = list(cache.rows())
    assert len(table) == len(rows)
    np.testing.assert_array_equal(np.array(table[3]["q"], np.float32), rows[3].q)
    run("rollout", "--student", folders[0], "--data", write_prompts(tmp_path / "d.jsonl", 3), "--cache", tmp_path / "c",
        "--device", "cpu")  # fmt: skip
    new = open_cache(tmp_path / "c")
    assert (len(to_dataset(new, unscored=True)), len(to_dataset(new))) == (3, 0)
    found = list(new.unscored_rows())
    wanted = new.load_rollouts(new.rollouts()[0][0])
    assert [row.completion_tokens.tolist() for row in found] == [row.tolist() for row in wanted.completions]
    assert [row.finished for row in found] == wanted.finished.tolist()
    assert list(cache.unscored_rows()) == []
    with pytest.raises(CacheError, match="no scores"):
        list(ScoredRows(tmp_path / "c"))


def test_every_command_tells_how_far_it_is(folders, tmp_path):
    seen = []
    data = write_prompts(tmp_path / "d.jsonl", 4)
    with on_progress(lambda *told: seen.append(told)):
        run("rollout", "--student", folders[0], "--data", data, "--cache", tmp_path / "c", "--device", "cpu")
        run("score", "--teacher", folders[1], "--cache", tmp_path / "c", "--device", "cpu")
        run("evaluate", "--model", folders[0], "--data", data, "--device", "cpu", "--metrics", "exact")
        run("learn", "--student", folders[0], "--cache", tmp_path / "c", "--out", tmp_path / "run", "--steps", 3,
            "--batch-size", 2, "--device", "cpu")  # fmt: skip
    last = {what: (done, total) for what, done, total in seen}
    assert last["rollouts"] == (4, 4)
    assert last["learn"] == (3, 3)
    assert len(last) == 4
    assert all(done == total for done, total in last.values())
    count = len(seen)
    run("rollout", "--student", folders[0], "--data", data, "--cache", tmp_path / "e", "--device", "cpu")
    assert len(seen) == count


def test_scores_of_a_model_that_we_do_not_run_are_those_of_our_teacher(cache, folders, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[1]).eval()

    def logits(prompt, completion):
        return plain_logits(model, prompt, completion, after=True)[:, : VOCAB + 2].numpy()

    made = score_with(cache, logits, teacher="theirs", keep_top=5)
    assert len(made) == 3
    assert score_with(cache, logits, teacher="theirs", keep_top=5) == []
    ours, theirs = (list(cache.rows(teacher)) for teacher in ("teacher", "theirs"))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("q", "max_q", "logsumexp", "mean_q"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-5)
        assert other.final_max_q == pytest.approx(one.final_max_q, abs=2e-5)
        before = logits(one.prompt_tokens, one.completion_tokens)[:-1, :VOCAB]
        np.testing.assert_array_equal(other.top.ids, np.argsort(-before, 1, kind="stable")[:, :5])
    batch = Collator()(list(ScoredRows(cache.path, teacher="theirs", keep_top=5)))
    assert batch["top_ids"].shape == (*batch["q"].shape, 5)
    refuses(
        NumericsError,
        r"^rollouts \w{12}, row 0: a NaN",
        lambda: score_with(cache, lambda p, c: logits(p, c) * np.nan, teacher="broken"),
    )
    refuses(
        ValueError, r"must be \(\d+, 60", lambda: score_with(cache, lambda p, c: logits(p, c)[:-1], teacher="short")
    )


def test_rollouts_from_elsewhere_are_checked_like_ours(folders, cache, tmp_path):
    new = open_cache(tmp_path / "c", create=True)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    prompts, end = ["cat dog", "dog"], tokenizer.eos_token_id
    completions = [[[5, 6, end], [7, end]], [[end], [9, 9, 9, 9]]]
    logprob = [[[-1.0] * len(row) for row in rows] for rows in completions]
    given = {"tokenizer": str(folders[0]), "policy": "theirs"}
    (id_,) = add_rollouts(new, prompts, completions, logprob, **given)
    assert add_rollouts(new, prompts, completions, logprob, **given) == [id_]
    assert len(new.rollouts()) == 1
    rollouts = new.load_rollouts(id_)
    assert rollouts.finished.tolist() == [True, True, True, False]
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 1]
    rows = list(new.unscored_rows())
    assert [row.prompt_tokens.tolist() for row in rows[1:3]] == tokenizer(prompts)["input_ids"]
    assert [row.completion_tokens.tolist() for row in rows] == list(chain.from_iterable(completions))
    run("score", "--teacher", folders[1], "--cache", tmp_path / "c", "--device", "cpu")
    run("learn", "--student", folders[0], "--cache", tmp_path / "c", "--out", tmp_path / "run", "--steps", 1,
        "--batch-size", 2, "--device", "cpu")  # fmt: skip
    short = [[row[:-1] for row in rows] for rows in logprob]
    refuses(DataError, "one number for every token", lambda: add_rollouts(new, prompts, completions, short, **given))
    refuses(DataError, "twice", lambda: add_rollouts(new, ["a", "a"], completions, logprob, **given))
    refuses(DataError, "as many", lambda: add_rollouts(new, prompts, [[[end]], []], logprob, **given))
    above = [[[1.0] * len(row) for row in rows] for rows in completions]
    refuses(CacheError, "logarithm of more than 1", lambda: add_rollouts(new, ["b", "c"], completions, above, **given))


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example in this process, and gives what it prints."""

    def ran(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return ran


def test_the_examples_run(folders, tmp_path, example):
    cache = make_cache(tmp_path / "cache", *folders)
    assert "epoch 1: mean return" in example("own_loop.py", folders[0], cache.path, tmp_path / "a")
    moved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a")
    before = AutoModelForSeq2SeqLM.from_pretrained(folders[0])
    assert not torch.equal(moved.shared.weight, before.shared.weight)
    student, teacher = (save_decoder(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "teacher")))
    shown = example("own_teacher.py", student, teacher, tmp_path / "c", "cat dog", "dog cat cat")
    assert shown.count("return -") == 2
    assert "mean loss" in example("own_trainer.py", student, tmp_path / "c", tmp_path / "b")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").num_parameters() > 0
