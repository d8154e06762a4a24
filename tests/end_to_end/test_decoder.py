"""The whole tool with a decoder-only teacher and student: pretrain → rollout → score → learn → evaluate."""

import json
import random

import numpy as np
import pytest
from tokenizers.normalizers import Replace

from ketchup_cache import open_cache
from ketchup_cache.config.commands import EvaluateConfig, PretrainConfig, RolloutConfig
from ketchup_cache.config.options import DataOptions
from ketchup_cache.errors import ConfigError, DataError, ModelError
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.text.prompts import tokenize_prompts
from ketchup_cache.text.read import data_info, read_examples
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import json_lines, metrics, run
from tests.helpers.models import (
    CHAT,
    VOCAB,
    WORDS,
    chat_tokenizer,
    make_decoder,
    make_decoder_tokenizer,
    save_decoder,
    with_bos,
)
from tests.helpers.oracle import plain_logits, plain_row_scores

NOUNS = WORDS[18:23]


def write_task(path, n: int, seed: int):
    """Copy one to four words after a sign; the template adds the sign."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(NOUNS, k=rng.randint(1, 4))) for _ in range(n)]
    path.write_text("".join(json.dumps({"prompt": t, "target": t}) + "\n" for t in texts))
    return path


def test_pretrain_rollout_score_learn_evaluate(tmp_path, capsys):
    train, test = write_task(tmp_path / "train.jsonl", 96, 0), write_task(tmp_path / "test.jsonl", 40, 1)
    form = ["--template", "{prompt} =", "--device", "cpu"]
    big = save_decoder(tmp_path / "t0", initializer_range=0.1)
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = save_decoder(tmp_path / "s0", seed=1, initializer_range=0.1, **narrow)
    teacher, cache, student = tmp_path / "t" / "best", tmp_path / "cache", tmp_path / "s" / "best"
    offline, onpolicy, sampled = tmp_path / "offline", tmp_path / "onpolicy", ["--samples", 2, "--max-new-tokens", 8]
    run("pretrain", "--model", big, "--data", train, *form, "--out", tmp_path / "t", "--epochs", 20, "--lr", 5e-3,
        "--batch-size", 16)  # fmt: skip
    run("rollout", "--student", teacher, "--greedy", "--data", train, *form, "--cache", tmp_path / "sft",
        "--max-new-tokens", 8)  # fmt: skip
    run("pretrain", "--model", small, "--cache", tmp_path / "sft", "--out", tmp_path / "s", "--epochs", 10,
        "--lr", 5e-3, "--batch-size", 32, "--device", "cpu")  # fmt: skip
    run("rollout", "--student", student, "--data", train, *form, *sampled, "--cache", cache)
    run("score", "--teacher", teacher, "--cache", cache, "--device", "cpu")
    learn = ["learn", "--student", student, "--cache", cache, "--k", 2, "--lr", 2e-3, "--batch-size", 32, *sampled,
             "--baseline", "mean", "--unfinished", "bootstrap", "--device", "cpu"]  # fmt: skip
    run(*learn, "--out", offline, "--steps", 2)
    run(*learn, "--out", onpolicy, "--steps", 24, "--teacher", teacher, "--refresh-every", 4)
    run("verify", cache)

    # learning raises the return of what the student samples, from far below the teacher's
    steps = metrics(onpolicy)
    assert [m["refreshed"] for m in steps] == [True, False, False, False] * 6
    before, after = (np.mean([m["return_mean"] for m in part]) for part in (steps[:4], steps[-4:]))
    assert before < -30
    assert after > before + 6
    # sampling and the training pass agree about the policy
    assert all(m["ratio_mean"] == pytest.approx(1, abs=1e-4) for m in steps if m["refreshed"])

    capsys.readouterr()
    run("evaluate", "--model", onpolicy / "best", "--data", test, *form, "--teacher", teacher, "--metrics", "exact",
        "--max-new-tokens", 8, "--outputs", tmp_path / "o.jsonl", "--json")  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    written = json_lines(tmp_path / "o.jsonl")
    hits = [line["output"].split() == line["target"].split() for line in written]
    assert result["metrics"]["exact"] == pytest.approx(100 * np.mean(hits))
    assert result["returns"]["mean"] < 0
    assert all(line["prompt"].endswith(" =") and "=" not in line["output"] for line in written)

    # what the run learned from, against plain passes
    plain_teacher, plain_student = load_model(str(teacher), device="cpu"), load_model(str(student), device="cpu")
    rows = list(open_cache(cache).rows(policy=str(student)))
    assert len(rows) >= 2 * 60
    for row in [*rows[:6], *rows[-6:]]:
        assert 1 not in row.prompt_tokens  # EOS
        assert row.prompt_tokens[-1] == load_tokenizer(str(student)).convert_tokens_to_ids("=")
        assert (row.completion_tokens[-1] == 1) == row.finished
        steps = range(len(row.completion_tokens))
        own = plain_logits(plain_student, row.prompt_tokens, row.completion_tokens).log_softmax(1)
        np.testing.assert_allclose(row.behavior_logprob, own[steps, row.completion_tokens.tolist()], atol=1e-4)
        plain = plain_row_scores(plain_teacher, row.prompt_tokens, row.completion_tokens, row.finished, VOCAB)
        for name, expected in plain.items():
            np.testing.assert_allclose(np.atleast_1d(getattr(row, name)), expected, rtol=0, atol=1e-4)


def test_what_can_not_be_used_is_refused_in_one_line(tmp_path):
    """A model that does not stop where its tokenizer ends texts; a prompt of which the tokenizer makes nothing."""
    folder, data = save_decoder(tmp_path / "m", eos_token_id=7), write_task(tmp_path / "d.jsonl", 6, 0)
    message = r"ends texts with '</s>' \(id 1\), at which the model does not stop"
    config = PretrainConfig(model=str(folder), out=tmp_path / "run", data=str(data), device="cpu")
    refuses(ModelError, message, pretrain, config)
    tokenizer, options = make_decoder_tokenizer(), DataOptions(data=str(data))
    tokenizer.backend_tokenizer.normalizer = Replace("the", "")
    data.write_text('{"prompt": "the cat"}\n{"prompt": "the"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: row 2: the tokenizer makes no token of this prompt"):
        tokenize_prompts(read_examples(options), tokenizer, options)


# --------------------------------------------------------------------------------------------------------- chat

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT


def test_a_chat_prompt_is_one_user_turn_with_the_assistants_open(tmp_path):
    data, tokenizer = write_task(tmp_path / "d.jsonl", 5, 0), chat_tokenizer()
    plain = read_examples(DataOptions(data=str(data)))
    for system, before in (("", ""), ("who runs", "<< system who runs >> ")):
        options = DataOptions(data=str(data), chat=True, system=system)
        kept = tokenize_prompts(plain, tokenizer, options)
        examples, prompts = kept.examples, kept.prompts
        expected = [f"<s>{before}<< user {e.prompt} >> << assistant" for e in plain]
        assert [e.prompt for e in examples] == expected
        assert [e.target for e in examples] == [e.target for e in plain]
        assert not {e.id for e in examples} & {e.id for e in plain}
        for row, text in zip(prompts.tokens, expected, strict=True):
            words = ["<s>", *text.removeprefix("<s>").split()]
            assert tokenizer.convert_ids_to_tokens(row.tolist()) == words  # one BOS, no EOS
        info = data_info(examples, options, tokenizer)
        assert info.template == f"<s>{before}<< user {{prompt}} >> << assistant"
        assert info.fingerprint != data_info(plain, DataOptions(data=str(data)), tokenizer).fingerprint
    assert tokenize_prompts(plain, tokenizer, DataOptions(data=str(data))).examples == plain


def test_rollout_and_evaluate_ask_in_the_same_words(tmp_path):
    chat_model = str(save_decoder(tmp_path / "chat", tokenizer=chat_tokenizer(), vocab_size=VOCAB + 4))
    data = str(write_task(tmp_path / "d.jsonl", 6, 0))
    common = {"data": data, "chat": True, "system": "who runs", "max_new_tokens": 5, "device": "cpu"}
    rollout(RolloutConfig(student=chat_model, cache=tmp_path / "cache", greedy=True, **common))
    cache = open_cache(tmp_path / "cache")
    ((prompts_id, manifest),) = cache.manifests("prompts")
    assert manifest.info.data.template == "<s><< system who runs >> << user {prompt} >> << assistant"
    evaluate(EvaluateConfig(model=chat_model, outputs=tmp_path / "o.jsonl", metrics="exact", **common))
    written = json_lines(tmp_path / "o.jsonl")
    ((rollouts_id, _),) = cache.rollouts()
    rollouts, tokenizer = cache.load_rollouts(rollouts_id), load_tokenizer(chat_model)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rollouts.completions]
    by_prompt = {cache.load_prompts(prompts_id).ids[p].tobytes().hex(): t for p, t in enumerate(texts)}
    assert {line["id"]: line["output"] for line in written} == by_prompt
    # the same texts without the chat are other prompts of the same cache
    plain = common | {"chat": False, "system": ""}
    assert evaluate(EvaluateConfig(model=chat_model, metrics="exact", **plain)).examples == 6
    report = rollout(RolloutConfig(student=chat_model, cache=tmp_path / "cache", greedy=True, **plain))
    assert report.already_there == 0
    assert len(list(open_cache(tmp_path / "cache").manifests("prompts"))) == 2


FORMS = {
    "plain": (make_decoder_tokenizer(), {"template": "{prompt} ="}, "{} ="),
    "bos": (with_bos(make_decoder_tokenizer()), {"template": "{prompt} ="}, "<s> {} ="),
    "chat": (chat_tokenizer(), {"chat": True}, "<s> << user {} >> << assistant"),
}


@pytest.mark.parametrize("name", FORMS)
def test_first_loss_is_the_mean_negative_log_likelihood_of_target_and_eos(name, tmp_path):
    tokenizer, form, prompt = FORMS[name]
    folder = save_decoder(tmp_path / "m", tokenizer=tokenizer, vocab_size=VOCAB + 4)
    words, nll = tokenizer.get_vocab(), []
    data = write_task(tmp_path / "d.jsonl", 6, 0)
    options = {"model": str(folder), "out": tmp_path / "run", "batch_size": 6, "epochs": 1, "device": "cpu"}
    report = pretrain(PretrainConfig(**options, data=str(data), **form))
    model = make_decoder("qwen2", vocab_size=VOCAB + 4)
    for text in [line["target"] for line in json_lines(data)]:
        given, target = ([words[word] for word in part.split()] for part in (prompt.format(text), f"{text} </s>"))
        logprob = plain_logits(model, given, target)[:, : max(words.values()) + 1].double().log_softmax(1)
        nll += (-logprob[range(len(target)), target]).tolist()
    assert report.loss_first == pytest.approx(np.mean(nll), rel=1e-5)


def test_what_a_template_does_not_offer_is_said_in_one_line(tmp_path):
    data = str(write_task(tmp_path / "d.jsonl", 2, 0))
    for template, system, message in (
        (None, "", "--chat: the model's tokenizer has no chat template: leave --chat out"),
        (NO_SYSTEM, "who runs", "(System role not supported): leave --system out"),
        ("{% for %}", "", "--chat: the chat template can't be used ("),
        ("{{ messages[-1].content }} </s>", "who runs", "leaves the text of --system out: put it into --template"),
        ("{{ raise_exception('a system turn must come first') }}", "", "must come first): give --system TEXT, leave"),
    ):
        options = DataOptions(data=data, chat=True, system=system)
        refused = refuses(ConfigError, ".", tokenize_prompts, read_examples(options), chat_tokenizer(template), options)
        assert message in refused


def test_a_turn_that_stays_closed_is_said(tmp_path, capsys):
    data = str(write_task(tmp_path / "d.jsonl", 2, 0))
    options = DataOptions(data=data, chat=True)
    for template, said in (("user {{ messages[-1].content }} </s>", 1), (CHAT, 0)):
        tokenize_prompts(read_examples(options), chat_tokenizer(template), options)
        assert capsys.readouterr().err.count("does not open the assistant's turn") == said


def test_half_a_turn_is_not_an_option(tmp_path, capsys):
    for words, message in (
        (["--system", "who"], "set --chat too"),
        (["--chat", "--long-prompts", "truncate"], "would cut off the end of the turn"),
    ):
        assert message in fails(capsys, "evaluate", "--model", "m", "--data", "d.jsonl", *words)
