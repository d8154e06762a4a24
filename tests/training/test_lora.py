"""LoRA adapters: read and written as peft has them, trained as all weights are, at home wherever a model is."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.config.options import LossOptions, StudentOptions
from ketchup_cache.errors import ModelError
from ketchup_cache.models import lora
from ketchup_cache.models.fingerprint import state_fingerprint, weights_fingerprint
from ketchup_cache.models.folders import ADAPTER, ADAPTER_WEIGHTS, ORIGIN
from ketchup_cache.models.forward import completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.training.learn import learn
from ketchup_cache.training.optimizer import Learner, all_rows
from ketchup_cache.training.policy_gradient import policy_gradient
from tests.helpers.browser import data_of
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails, refuses
from tests.helpers.learning import config, json_lines, killed_before, metrics, run, whole_batch
from tests.helpers.models import VOCAB, edit_config, make_model, save_decoder, save_model, write_prompts

CPU = ("--device", "cpu")


def save(family, folder):
    return save_model(folder, family[3:], seed=1) if "t5" in family else save_decoder(folder, family, seed=1)


def whole(folder):
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def save_adapter(base, folder, *, basis=False, **options):
    """By peft alone, with B at random; basis: A is the unit matrix, and B is 0. Returns peft's model."""
    torch.manual_seed(0)
    model = get_peft_model(whole(base), LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and not basis:
            torch.nn.init.normal_(parameter, 0, 0.05)
        if ".lora_A." in name and basis:
            torch.nn.init.eye_(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def pair(tmp_path):
    """A base and an adapter of it, without a tokenizer."""
    save_adapter(save("t5-1.1", tmp_path / "base"), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def edit(folder, **values):
    file = folder / ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def logits(model):
    ids = torch.arange(3, 12)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"o": 3}, "rank_pattern": {"q": 2}}])
@pytest.mark.parametrize("family", ["t5-1.1", "t5-1.0", "qwen2-tied", "gpt2"])
def test_it_is_the_model_that_peft_makes_of_it(family, options, tmp_path):
    base, folder = save(family, tmp_path / "base"), tmp_path / "adapter"
    wanted = logits(save_adapter(base, folder, **options))
    assert (wanted - logits(whole(base))).abs().max() > 0.01
    merged, beside = (load_model(str(folder), device="cpu", fit=fit) for fit in (None, StudentOptions()))
    for model in (merged, beside):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == whole(base).state_dict().keys()
    assert all(weight.requires_grad == ("lora_" in key) for key, weight in beside.named_parameters())
    lora.save(beside, tmp_path / "again")
    again = PeftModel.from_pretrained(whole(base), tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)
    assert state_fingerprint(beside) == weights_fingerprint(folder) == weights_fingerprint(tmp_path / "again")
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(base)).get_vocab()


def test_what_tells_two_adapters_apart(pair, tmp_path):
    base, folder = pair
    first = weights_fingerprint(folder)
    shutil.copytree(base, tmp_path / "elsewhere")
    edit(folder, base_model_name_or_path=str(tmp_path / "elsewhere"), inference_mode=False, lora_dropout=0.1)
    assert weights_fingerprint(folder) == first
    found = [first, weights_fingerprint(base)]
    other = {"base_model_name_or_path": str(save_model(tmp_path / "other", "1.1", seed=2))}
    for change in ({"lora_alpha": 9}, {"use_rslora": True}, other):
        edit(folder, **change)
        found.append(weights_fingerprint(folder))
    weights = load_file(folder / ADAPTER_WEIGHTS)
    weights[min(weights)][0, 0] += 1e-3
    save_file(weights, folder / ADAPTER_WEIGHTS)
    found.append(weights_fingerprint(folder))
    assert len(set(found)) == len(found)


def drop_a_weight(folder):
    weights = load_file(folder / ADAPTER_WEIGHTS)
    del weights[max(weights)]
    save_file(weights, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "adapter with peft_type 'IA3', of which only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "adapter with modules_to_save"),
        ({"use_dora": True}, "adapter with use_dora True"),
        ({"init_lora_weights": "pissa"}, "adapter with init_lora_weights 'pissa'"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./gone"}, "the base of this adapter .*: ./gone: no such folder"),
        ({"base_model_name_or_path": "owner/gone", "revision": "abc"}, "owner/gone: no such folder, and the Hugging"),
        ({"base_model_name_or_path": "SELF"}, "has no config.json, so it is not a model folder"),
        (drop_a_weight, "adapter: its weights do not fit .* is in one of them"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x"), "can't be loaded"),
        (lambda folder: (folder / ORIGIN).write_text('{"base": "0123"}'), "is not the model that this adapter was tr"),
        ({"target_modules": ["lm_head"]}, "an adapter of lm_head is not supported"),
        ({"target_modules": ["nothing"]}, "can't be loaded .Target modules"),
    ],
)  # fmt: skip
def test_an_unusable_adapter_is_refused_in_one_line(pair, change, message):
    if callable(change):
        change(pair[1])
    else:
        edit(pair[1], **{key: str(pair[1]) if value == "SELF" else value for key, value in change.items()})
    refuses(ModelError, message, load_model, str(pair[1]), device="cpu")


def test_options_that_do_not_fit_the_folder(pair, monkeypatch):
    base, folder = map(str, pair)
    new = StudentOptions(lora_rank=2)
    refuses(ModelError, "is an adapter of rank 4 already", load_model, folder, fit=new)
    refuses(ModelError, "nothing for --lora-merge", load_model, base, fit=StudentOptions(lora_merge=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    refuses(ModelError, "pip install 'ketchup-cache", load_model, base, fit=new)
    edit_config(pair[0], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses(ModelError, "QLoRA", load_model, base, fit=new)


def test_the_base_may_stand_beside_where_the_command_runs(pair, monkeypatch):
    """As peft reads it; what is written names it so that it is found from everywhere."""
    base, folder = pair
    edit(folder, base_model_name_or_path="base")
    monkeypatch.chdir(base.parent)
    lora.save(load_model(str(folder), device="cpu", fit=StudentOptions()), folder)
    monkeypatch.chdir(os.sep)
    assert json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"] == str(base)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def batch(tmp_path, folders):
    return whole_batch(make_cache(tmp_path / "cache", *folders, stale=0.7))


def gradient(model, batch) -> dict[str, torch.Tensor]:
    """Of one policy-gradient step."""
    policy_gradient(Learner(model, Head.of(model, VOCAB), None, LossOptions(k=2)), batch, 1)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["t5-1.1", "gpt2", "qwen2-tied"])
def test_the_gradient_is_that_of_all_weights_seen_through_the_adapter(family, batch, tmp_path):
    """B = 0 at the start: dL/dB = α/r · dL/dW Aᵀ, and dL/dA = 0."""
    make_model(family).save_pretrained(tmp_path / "base")
    options = (StudentOptions(), StudentOptions(lora_rank=3, lora_alpha=7))
    all_weights, model = (load_model(str(tmp_path / "base"), device="cpu", fit=each) for each in options)
    full, mine, adapters = gradient(all_weights, batch), gradient(model, batch), dict(model.named_parameters())
    layers = [name.split(".lora_B.")[0] for name in mine if ".lora_B." in name]
    assert len(mine) == 2 * len(layers) >= 2 * 4
    for layer in layers:
        of_weight = full[f"{layer}.weight"]
        of_weight = of_weight.T if family == "gpt2" else of_weight  # whose layers have them transposed
        wanted = 7 / 3 * of_weight @ adapters[f"{layer}.lora_A.default.weight"].detach().T
        near = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(mine[f"{layer}.lora_B.default.weight"], wanted, rtol=1e-4, atol=near)
        assert not mine[f"{layer}.lora_A.default.weight"].any()


def kept_for_the_backward_pass(model, batch) -> int:
    """Bytes."""
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        completion_states(model, all_rows(batch))
    return sum(kept.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", ["t5-1.1", "umt5", "bart", "gpt2", "qwen2-tied", "gemma2"])
def test_gradient_checkpointing_changes_memory_alone(family, rank, batch, tmp_path):
    make_model(family).save_pretrained(tmp_path / "base")
    options = (StudentOptions(lora_rank=rank, gradient_checkpointing=again) for again in (False, True))
    one, other = (load_model(str(tmp_path / "base"), device="cpu", fit=each) for each in options)
    assert kept_for_the_backward_pass(other, batch) < 0.6 * kept_for_the_backward_pass(one, batch)
    wanted, found = gradient(one, batch), gradient(other, batch)
    assert found.keys() == wanted.keys()
    for name, plain in wanted.items():
        torch.testing.assert_close(found[name], plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()), msg=name)


def test_with_a_basis_for_a_a_step_is_the_step_of_the_weights(tmp_path, folders):
    """A the unit matrix, B = 0, α = r: AdamW on B takes the step that it takes on W."""
    make_cache(tmp_path / "cache", *folders, stale=0.7)
    save_adapter(folders[0], tmp_path / "adapter", basis=True, r=32, lora_alpha=32, target_modules=["q", "v"])
    options = {"steps": 1, "weight_decay": 0.0, "max_grad_norm": 1e9}
    learn(config(tmp_path, folders, out=tmp_path / "whole", **options))
    learn(config(tmp_path, [tmp_path / "adapter"], out=tmp_path / "own", policy=str(folders[0]), **options))
    start, wanted = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "whole" / "last"))
    own = load_model(str(tmp_path / "own" / "last"), device="cpu").state_dict()
    moved = [name for name in start if not torch.equal(own[name], start[name])]
    assert len(moved) == 2 * 3 * 2
    for name in moved:
        assert (own[name] - start[name]).abs().max() > 5e-4
        torch.testing.assert_close(own[name], wanted[name], rtol=0, atol=2e-6)


# --------------------------------------------------------------------------------------------------------------- runs


def test_killed_and_resumed_an_adapter_has_the_same_bits_and_the_base_is_never_written(tmp_path, folders):
    """On-policy, with a dev set; the merged run ends with what the adapter is when it is loaded."""
    data = write_prompts(tmp_path / "d.jsonl", 12)
    given = {"samples": 2, "max_new_tokens": 6, "refresh_every": 2, "steps": 6, "checkpoint_every": 2, "lora_rank": 2}
    given |= {"teacher": str(folders[1]), "eval_data": str(data), "metric": "chrf", "eval_every": 3, "lr": 0.02}
    for out in (tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "merged"):
        cache = ("--cache", out / "cache", "--samples", 2, "--max-new-tokens", 6)
        run("rollout", "--student", folders[0], "--data", data, *cache)
        own = {"cache": out / "cache", "out": out, "lora_merge": out.name == "merged"}
        options = config(tmp_path, folders, **given, **own)
        if out.name == "killed":
            with killed_before(5):
                learn(options)
        report = learn(options)
        assert (out.name == "killed") == (report.resumed_from == 4)
        assert report.fingerprint == weights_fingerprint(out / "last")
        assert [line["ratio_mean"] for line in metrics(out) if line["refreshed"]] == pytest.approx([1] * 3, abs=1e-5)
        assert json_lines(out / "dev.jsonl")[-1]["kl_start"] > 1e-5
    one, other = (tmp_path / name / "last" / ADAPTER_WEIGHTS for name in ("undisturbed", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert all(file.stat().st_size < 3 * one.stat().st_size for file in (tmp_path / "killed").rglob("*.safetensors"))
    merged, loaded = load_file(out / "last" / "model.safetensors"), load_model(str(other.parent), device="cpu")
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in merged.items())
    assert not (out / "last" / ADAPTER).exists()


def test_from_references_to_a_trained_adapter_by_every_command(tmp_path, capsys, monkeypatch):
    """Of a decoder-only base: the adapter's rollouts are those of the merged model, token by token."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "teacher")):
        save_decoder(tmp_path / name, "qwen2", seed=seed)
    data = write_prompts(tmp_path / "d.jsonl", 12)
    training = ("pretrain", "--model", "base", "--data", data, "--lr", 0.01, "--lora-rank", 4, *CPU)
    for out, *more in (("sft",), ("whole", "--lora-merge")):
        run(*training, "--epochs", 3, "--lora-targets", "q_proj,down_proj", "--out", out, *more)
        run("rollout", "--student", f"{out}/last", "--data", data, "--cache", f"{out}-cache", "--samples", 3, *CPU)
    caches = [open_cache(f"{out}-cache") for out in ("sft", "whole")]
    (one,), (other,) = ([cache.load_rollouts(id_) for id_, _ in cache.rollouts()] for cache in caches)
    assert np.array_equal(one.completions.values, other.completions.values)
    assert len(set(one.completions.values.tolist())) > 5
    run("score", "--teacher", "teacher", "--cache", "sft-cache", *CPU)
    run("score", "--teacher", "sft/best", "--cache", "whole-cache", *CPU)
    for row in open_cache("whole-cache").rows():  # a policy scored by itself
        np.testing.assert_allclose(row.q - row.logsumexp, row.behavior_logprob, atol=1e-4)
    learning = ("learn", "--student", "sft/best", "--cache", "sft-cache", "--batch-size", 12, "--steps", 2, *CPU)
    capsys.readouterr()
    run(*learning, "--out", "learnt", "--gradient-checkpointing")
    assert "rollouts of this student" in capsys.readouterr().err
    assert metrics(tmp_path / "learnt")[0]["ess"] == pytest.approx(1, abs=1e-6)
    assert len({weights_fingerprint(tmp_path / name / "last") for name in ("sft", "learnt", "whole")}) == 3
    for name in ("sft", "learnt"):
        outputs = ("--outputs", f"{name}.jsonl", "--teacher", "teacher")
        run("evaluate", "--model", f"{name}/last", "--data", data, *outputs, *CPU)
    run("compare", "sft.jsonl", "learnt.jsonl")
    run("report", "sft", "learnt", "--student", "last", "--out", "runs.html")
    data = data_of(tmp_path / "runs.html")
    assert data["notes"][0].startswith("sft has no token view (")  # it learned from references
    drawn, now = (
        np.concatenate([row[key] for row in data["rollouts"]]) for key in ("behavior_logprob", "student_logprob")
    )
    assert 1e-4 < np.abs(drawn - now).max() < 1  # two steps away from the adapter that drew them
    card = (tmp_path / "learnt" / "last" / "README.md").read_text()
    assert "library_name: peft" in card
    assert weights_fingerprint(tmp_path / "sft" / "best") in card  # trained from
    capsys.readouterr()
    run("push", "learnt/last", "hf://lab/adapter", "--dry-run", "--json")
    sent = json.loads(capsys.readouterr().out)["files"]
    assert {ADAPTER, ADAPTER_WEIGHTS, ORIGIN, "README.md", "tokenizer.json"} <= {*sent}
    assert "model.safetensors" not in sent
    assert "give --lora-rank too" in fails(capsys, *learning, "--out", "new", "--lora-alpha", 4)
    save_decoder(tmp_path / "base", "qwen2", seed=5)
    longer = ("--epochs", 4, "--lora-targets", "q_proj,down_proj", "--out", "sft")
    assert "base is not as it was" in fails(capsys, *training, *longer)
    assert "is not the model that this adapter was trained on" in fails(capsys, *learning, "--out", "new")
    shutil.rmtree("base")
    assert f"named by base_model_name_or_path: {tmp_path / 'base'}" in fails(capsys, *learning, "--out", "new")
