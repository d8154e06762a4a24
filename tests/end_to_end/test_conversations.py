"""Conversations of three turns of the assistant, from `messages` to a trained student, by the public commands."""

import json
import random

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.models.origin import read_origin
from ketchup_cache.provenance import PromptForm
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.errors import fails
from tests.helpers.learning import json_lines, metrics, run
from tests.helpers.models import MARKED, VOCAB, WORDS, chat_tokenizer, make_decoder, save_decoder
from tests.helpers.oracle import plain_logits

NOUNS = WORDS[18:22]
CPU = ["--device", "cpu"]


def write_talks(path, n: int, seed: int):
    """The user says two words, the assistant says them too: three times."""
    rng = random.Random(seed)
    texts = [[" ".join(rng.choices(NOUNS, k=2)) for _ in range(3)] for _ in range(n)]
    talks = [[{"role": r, "content": t} for t in three for r in ("user", "assistant")] for three in texts]
    path.write_text(json.dumps([{"messages": [{"role": "system", "content": "small dog"}, *talk]} for talk in talks]))
    return path, talks


def save_chat(folder, *, template=MARKED, **options):
    return save_decoder(folder, tokenizer=chat_tokenizer(template), vocab_size=VOCAB + 4, **options)


def test_only_what_the_assistant_writes_is_in_the_loss(tmp_path, monkeypatch):
    """The tokens that reach the loss, decoded, are the assistant's. The first loss is the mean over transformers' mask
    of whole conversations, by one plain pass over each."""
    data, talks = write_talks(tmp_path / "d.json", 4, 0)
    seen, accumulate = [], Learner.accumulate

    def spied(self, batch, chosen, loss, number):
        return accumulate(
            self, batch, chosen, lambda p, s, ids: [seen.extend(ids.tolist()), loss(p, s, ids)][1], number
        )

    monkeypatch.setattr(Learner, "accumulate", spied)
    given = {"model": str(save_chat(tmp_path / "m")), "data": str(data), "device": "cpu", "epochs": 1, "lr": 1e-9}
    report = pretrain(PretrainConfig(**given, out=tmp_path / "p", batch_size=12))
    decoded = " ".join(chat_tokenizer().convert_ids_to_tokens(seen)).split(" </s>")
    said = [talk[place]["content"] for talk in talks for place in (1, 3, 5)]
    assert sorted(text.strip() for text in decoded) == ["", *sorted(said)]
    plain, nll = make_decoder("qwen2", vocab_size=VOCAB + 4), []
    how = {"return_assistant_tokens_mask": True, "return_dict": True, "add_special_tokens": False}
    for row in json.loads(data.read_text()):
        whole = chat_tokenizer(MARKED).apply_chat_template(row["messages"], **how)
        ids, mask = whole["input_ids"], np.array(whole["assistant_masks"])
        logprob = plain_logits(plain, ids[:1], ids[1:]).double()[:, : VOCAB + 4].log_softmax(1)
        nll += [-logprob[place, ids[place + 1]].item() for place in np.flatnonzero(mask[1:])]
    assert (report.examples, len(nll)) == (12, 4 * 3 * 3)
    assert report.loss_first == pytest.approx(np.mean(nll), rel=1e-5)
    assert pretrain(PretrainConfig(**given, out=tmp_path / "l", batch_size=4, turns="last")).examples == 4


def test_from_messages_to_a_trained_student(tmp_path, capsys):
    """The form of the prompts, arguments of the template too, is given once: models and caches remember it."""
    template = MARKED.replace("{{ bos_token }}", "{{ bos_token }}{{ '+ ' if plus }}")
    (data, _), (test, _) = write_talks(tmp_path / "d.json", 24, 0), write_talks(tmp_path / "t.json", 8, 1)
    big, small = (
        save_chat(tmp_path / f"m{seed}", template=template, seed=seed, initializer_range=0.1) for seed in (0, 1)
    )
    teacher, student, cache = tmp_path / "t" / "best", tmp_path / "s" / "best", tmp_path / "cache"
    given, length = ["--data", data, "--batch-size", 12, "--lr", 5e-3, *CPU], ["--max-new-tokens", 6]
    for model, out, epochs in ((big, tmp_path / "t", 16), (small, tmp_path / "s", 3)):
        run("pretrain", "--model", model, *given, "--template-arg", "plus=true", "--out", out, "--epochs", epochs)
    run("rollout", "--student", student, "--data", data, "--samples", 2, *length, "--cache", cache, *CPU)
    run("score", "--teacher", teacher, "--cache", cache, *CPU)
    run("learn", "--student", student, "--cache", cache, "--teacher", teacher, "--k", 2, "--lr", 2e-3,
        "--batch-size", 16, "--samples", 2, "--steps", 8, "--refresh-every", 2, *length, "--out", tmp_path / "run",
        "--eval-data", test, "--metric", "loss,exact", *CPU)  # fmt: skip
    steps = metrics(tmp_path / "run")
    assert np.mean([m["return_mean"] for m in steps[-2:]]) > np.mean([m["return_mean"] for m in steps[:2]])
    form = PromptForm(chat=True, template_arg=("plus=true",))
    assert [read_origin(str(model)).prompts for model in (teacher, student, tmp_path / "run" / "last")] == [form] * 3

    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "run" / "best", "--data", test, "--metrics", "loss,exact", *length, *CPU,
        "--outputs", tmp_path / "o.jsonl", "--json")  # fmt: skip
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    best = next(line for line in reversed(json_lines(tmp_path / "run" / "dev.jsonl")) if line["best"])
    found = json.loads(shown.out)["metrics"]
    assert {name: found[name] for name in best["metrics"]} == pytest.approx(best["metrics"], abs=1e-5)
    rows = json.loads(test.read_text())
    assert [row["target"] for row in json_lines(tmp_path / "o.jsonl")] == [r["messages"][-1]["content"] for r in rows]
    run("show", cache, "--rows", 0)
    assert "<s>+<<systemsmalldog>><<user" in capsys.readouterr().out
    tokenizer, wanted = chat_tokenizer(template), set()
    for row in json.loads(data.read_text()):
        how = {"add_generation_prompt": True, "tokenize": False, "plus": True}
        text = tokenizer.apply_chat_template(row["messages"][:-1], **how)
        wanted.add(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert {tuple(row.prompt_tokens.tolist()) for row in open_cache(cache).rows()} == wanted
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "dog", "target": "dog"}))
    run("evaluate", "--model", student, "--data", tmp_path / "p.jsonl", "--metrics", "exact", *CPU,
        "--outputs", tmp_path / "o.jsonl")  # fmt: skip
    assert json_lines(tmp_path / "o.jsonl")[0]["prompt"] == "<s>+ << user dog >> << assistant "
    run("rollout", "--student", student, "--data", data, "--first", 1, "--cache", cache, "--prefill", "dog", *CPU)
    said = "was trained with --template-arg ('plus=true',), not (), --prefill '', not 'dog'"
    assert said in capsys.readouterr().err
    assert "--tokenizer" in fails(capsys, "show", data)
