"""Training adapters: gradients against those of all weights, runs that are killed, and rollouts of what comes out."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ketchup_cache import open_cache
from ketchup_cache.config.options import LossOptions, StudentOptions
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.folders import ADAPTER_WEIGHTS
from ketchup_cache.models.forward import completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.training.learn import learn
from ketchup_cache.training.optimizer import Learner, all_rows
from ketchup_cache.training.policy_gradient import policy_gradient
from tests.helpers.caches import make_cache
from tests.helpers.errors import fails
from tests.helpers.learning import config, json_lines, killed_before, metrics, run, whole_batch
from tests.helpers.lora import save_adapter
from tests.helpers.models import VOCAB, make_model, save_decoder, write_prompts


@pytest.fixture
def batch(tmp_path, folders):
    return whole_batch(make_cache(tmp_path / "cache", *folders, stale=0.7))


def gradient(model, batch) -> dict[str, torch.Tensor]:
    """Of one policy-gradient step."""
    model.zero_grad()
    policy_gradient(Learner(model, Head.of(model, VOCAB), None, LossOptions(k=2)), batch, 1)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["t5-1.1", "gpt2", "qwen2-tied"])
def test_the_gradient_is_that_of_all_weights_seen_through_the_adapter(family, batch, tmp_path):
    """B = 0 at the start: dL/dB = α/r · dL/dW Aᵀ, and dL/dA = 0."""
    make_model(family).save_pretrained(tmp_path / "base")
    options = StudentOptions(lora_rank=3, lora_alpha=7)
    model = load_model(str(tmp_path / "base"), device="cpu", fit=options)
    whole, mine = (gradient(m, batch) for m in (load_model(str(tmp_path / "base"), device="cpu"), model))
    adapters = dict(model.named_parameters())
    layers = [name.split(".lora_B.")[0] for name in mine if ".lora_B." in name]
    assert len(mine) == 2 * len(layers) >= 2 * 4
    for layer in layers:
        full = whole[f"{layer}.weight"]
        full = full.T if family == "gpt2" else full  # whose layers have their weights transposed
        wanted = 7 / 3 * full @ adapters[f"{layer}.lora_A.default.weight"].T
        near = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(mine[f"{layer}.lora_B.default.weight"], wanted, rtol=1e-4, atol=near)
        assert not mine[f"{layer}.lora_A.default.weight"].any()


def kept_for_the_backward_pass(model, batch) -> int:
    """Bytes."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_states(model, all_rows(batch))
    return sum(kept.values())


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["t5-1.1", "umt5", "bart", "gpt2", "qwen2-tied", "gemma2"])
def test_gradient_checkpointing_changes_memory_alone(family, adapter, batch, tmp_path):
    make_model(family).save_pretrained(tmp_path / "base")
    options = (StudentOptions(lora_rank=2 * adapter, gradient_checkpointing=again) for again in (False, True))
    one, other = (load_model(str(tmp_path / "base"), device="cpu", fit=each) for each in options)
    assert kept_for_the_backward_pass(other, batch) < 0.6 * kept_for_the_backward_pass(one, batch)
    wanted, found = gradient(one, batch), gradient(other, batch)
    assert found.keys() == wanted.keys()
    for name, plain in wanted.items():
        torch.testing.assert_close(found[name], plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()), msg=name)


def test_with_a_basis_for_a_a_step_is_the_step_of_the_weights(tmp_path, folders):
    """A the unit matrix, B = 0, α = r: AdamW on B takes the step that it takes on W."""
    make_cache(tmp_path / "cache", *folders, stale=0.7)
    save_adapter(folders[0], tmp_path / "adapter", spread=0, basis=True, r=32, lora_alpha=32, target_modules=["q", "v"])
    shutil.copy(folders[0] / "tokenizer.json", tmp_path / "adapter")
    shutil.copy(folders[0] / "tokenizer_config.json", tmp_path / "adapter")
    options = {"steps": 1, "weight_decay": 0.0, "max_grad_norm": 1e9}
    learn(config(tmp_path, folders, out=tmp_path / "whole", **options))
    learn(config(tmp_path, [tmp_path / "adapter"], out=tmp_path / "own", policy=str(folders[0]), **options))
    start, whole = (load_file(folder / "model.safetensors") for folder in (folders[0], tmp_path / "whole" / "last"))
    own = load_model(str(tmp_path / "own" / "last"), device="cpu").state_dict()
    moved = [name for name in start if not torch.equal(own[name], start[name])]
    assert len(moved) == 2 * 3 * 2
    for name in moved:
        assert (own[name] - start[name]).abs().max() > 5e-4
        torch.testing.assert_close(own[name], whole[name], rtol=0, atol=2e-6)


def test_killed_and_resumed_an_adapter_has_the_same_bits_and_the_base_is_never_written(tmp_path, folders):
    """On-policy, with a dev set; the merged run ends with what the adapter is when it is loaded."""
    data = write_prompts(tmp_path / "d.jsonl", 12)
    given = {"samples": 2, "max_new_tokens": 6, "refresh_every": 2, "steps": 6, "checkpoint_every": 2, "lora_rank": 2}
    given |= {"teacher": str(folders[1]), "eval_data": str(data), "metric": "chrf", "eval_every": 3, "lr": 0.02}
    results = {}
    for out in ("undisturbed", "killed", "merged"):
        run("rollout", "--student", folders[0], "--data", data, "--cache", tmp_path / out / "cache", "--samples", 2,
            "--max-new-tokens", 6)  # fmt: skip
        cache = {"cache": tmp_path / out / "cache", "out": tmp_path / out / "run", "lora_merge": out == "merged"}
        options = config(tmp_path, folders, **given, **cache)
        if out == "killed":
            with killed_before(5):
                learn(options)
        report = learn(options)
        assert (out == "killed") == (report.resumed_from == 4)
        assert report.fingerprint == weights_fingerprint(options.out / "last")
        for line in metrics(options.out):
            assert not line["refreshed"] or line["ratio_mean"] == pytest.approx(1, abs=1e-5)
        results[out] = options.out
    one, other = (load_file(results[out] / "last" / ADAPTER_WEIGHTS) for out in ("undisturbed", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    size = sum(weight.nbytes for weight in one.values())
    for file in results["killed"].rglob("*.safetensors"):
        assert file.stat().st_size < 3 * size + 40_000, file
    merged = load_file(results["merged"] / "last" / "model.safetensors")
    loaded = load_model(str(results["killed"] / "last"), device="cpu").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in merged.items())
    assert not (results["merged"] / "last" / "adapter_config.json").exists()


def test_from_references_to_a_trained_adapter_by_every_command(tmp_path, capsys, monkeypatch):
    """Of a decoder-only base: the adapter's rollouts are those of the merged model, token by token, and it is at home
    wherever a model is."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "teacher")):
        save_decoder(tmp_path / name, "qwen2", seed=seed)
    data, cpu = write_prompts(tmp_path / "d.jsonl", 12), ("--device", "cpu")
    training = ("--data", data, "--epochs", 3, "--lr", 0.01, "--lora-targets", "q_proj,down_proj", *cpu)
    for out, *more in (("sft",), ("whole", "--lora-merge")):
        run("pretrain", "--model", "base", "--lora-rank", 4, "--out", out, *training, *more)
        run("rollout", "--student", f"{out}/last", "--data", data, "--cache", f"{out}-cache", "--samples", 3, *cpu)
    caches = [open_cache(f"{out}-cache") for out in ("sft", "whole")]
    (one,), (other,) = ([cache.load_rollouts(id_) for id_, _ in cache.rollouts()] for cache in caches)
    assert np.array_equal(one.completions.values, other.completions.values)
    assert len(set(one.completions.values.tolist())) > 5
    run("score", "--teacher", "teacher", "--cache", "sft-cache", *cpu)
    run("score", "--teacher", "sft/best", "--cache", "whole-cache", *cpu)
    for row in open_cache("whole-cache").rows():  # a policy scored by itself
        np.testing.assert_allclose(row.q - row.logsumexp, row.behavior_logprob, atol=1e-4)
    learning = ("learn", "--student", "sft/best", "--cache", "sft-cache", "--batch-size", 12, "--steps", 2, *cpu)
    capsys.readouterr()
    run(*learning, "--out", "learnt", "--gradient-checkpointing")
    assert "rollouts of this student" in capsys.readouterr().err
    assert metrics(tmp_path / "learnt")[0]["ess"] == pytest.approx(1, abs=1e-6)
    assert len({weights_fingerprint(tmp_path / name / "last") for name in ("sft", "learnt", "whole")}) == 3
    for name in ("sft", "learnt"):
        outputs = ("--outputs", f"{name}.jsonl", "--teacher", "teacher")
        run("evaluate", "--model", f"{name}/last", "--data", data, *outputs, *cpu)
        assert len(json_lines(tmp_path / f"{name}.jsonl")) == 12
    run("compare", "sft.jsonl", "learnt.jsonl")
    run("report", "sft", "learnt", "--out", "runs.html")
    assert "give --lora-rank too" in fails(capsys, *learning, "--out", "new", "--lora-alpha", 4)
    shutil.rmtree("base")
    assert f"named by base_model_name_or_path: {tmp_path / 'base'}" in fails(capsys, *learning, "--out", "new")
