import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from ketchup_cache.errors import ModelError
from ketchup_cache.models.fingerprint import state_fingerprint, weights_fingerprint
from ketchup_cache.models.folders import resolve_folder
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer, pick_device
from tests.helpers.errors import refuses
from tests.helpers.models import FAMILIES, edit_config, make_model, make_t5, make_tokenizer, save_decoder, save_model

TIED = ("t5-1.0", "qwen2-tied", "gpt2", "gemma2", "cohere", "bloom-alibi")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "1.1")


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def edit_weights(folder, change):
    """change: weights → None, in place, or others."""
    weights, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    changed = change(weights)
    save_file(changed if isinstance(changed, dict) else weights, file, metadata={"format": "pt"})


def refusal(load, folder) -> str:
    return refuses(ModelError, ".", load, str(folder))


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", *FAMILIES])
def test_a_saved_model_comes_back_as_it_was(family, tmp_path):
    saved = make_model(family)
    before = state_fingerprint(saved)
    saved.train().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert not loaded.training
    assert is_encoder_decoder(str(tmp_path)) == family.startswith("t5")
    assert getattr(loaded.config, "scale_decoder_outputs", False) == (family == "t5-1.0")
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (saved, loaded)]
    assert tied == [family in TIED] * 2
    assert {before, state_fingerprint(saved), state_fingerprint(loaded)} == {weights_fingerprint(tmp_path)}
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    loaded.bfloat16().save_pretrained(tmp_path / "half")
    assert state_fingerprint(loaded) == weights_fingerprint(tmp_path / "half") != before


@pytest.mark.parametrize("family", ["t5-1.1", "gpt2"])
def test_the_fused_gelu_is_the_models_own_function(family, tmp_path):
    """No farther than transformers' own from its model in float64; and there must have been one to fuse."""
    make_model(family).save_pretrained(tmp_path)
    kind = AutoModelForCausalLM if family == "gpt2" else AutoModelForSeq2SeqLM
    plain, inputs = kind.from_pretrained(tmp_path), {"input_ids": torch.arange(3, 20)[None]}
    inputs |= {} if family == "gpt2" else {"decoder_input_ids": torch.arange(9)[None]}
    assert any(type(module) is NewGELUActivation for module in plain.modules())
    fused = load_model(str(tmp_path), device="cpu")
    assert not any(type(module) is NewGELUActivation for module in fused.modules())
    assert fused.config.to_dict() == plain.config.to_dict()
    with torch.no_grad():
        ours, own = fused(**inputs).logits, plain(**inputs).logits
        exact = plain.double()(**inputs).logits
        error, own_error = (float((logits - exact).abs().max()) for logits in (ours, own))
        assert error < 1.5 * own_error < 1e-4
        fused.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_precision_and_devices(good):
    assert load_model(str(good), dtype="bfloat16", device="cpu").lm_head.weight.dtype == torch.bfloat16
    assert load_model(str(good), device_map="cpu").device.type == "cpu"
    assert pick_device("cpu") == torch.device("cpu")
    for device in ("cuda:99", "cpu:1", "xpu", "gpu"):
        refuses(ModelError, "is not on this machine: use auto, or one of cpu", pick_device, device)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "holds no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer can't be loaded"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer can't be loaded"),
        (lambda d: edit_weights(d, lambda w: w.pop("encoder.final_layer_norm.weight")), "1 weights missing (first:"),
        (lambda d: edit_weights(d, lambda w: w.update(extra=torch.zeros(2))), "1 weights not part of the model"),
        (lambda d: edit_weights(d, lambda w: w.update({"lm_head.weight": torch.zeros(61, 32)})), "has shape (61, 32)"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pickled .bin ones"),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights in safetensors format"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: can't be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: is not a JSON object"),
        (lambda d: edit_config(d, model_type="no-such-architecture"), "can't be loaded"),
        (lambda d: edit_config(d, num_layers=10**6), "config.json says 1,000,000 layers, but there are"),
        (lambda d: edit_config(d, num_decoder_layers=10**6), "says 1,000,000 layers"),
        (lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")), "not a regular file"),
        (lambda d: edit_config(d, model_type="gpt2", is_encoder_decoder=False), "config.json makes it (60, 768)"),
        (lambda d: edit_config(d, model_type="vit", is_encoder_decoder=False), "vit is not a language model"),
        (lambda d: edit_config(d, model_type="whisper", vocab_size=60), "whisper is not a language model"),
    ],
)  # fmt: skip
def test_an_unusable_folder_is_refused_in_one_line(copy, damage, message):
    damage(copy)
    found = refusal(load_tokenizer if "tokenizer" in message else load_model, copy)
    assert message in found
    assert str(copy) in found


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "lm_head.weight"),
        ("llama", lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up" not in k}, "1 weights missing"),
        ("gpt2", lambda w: w | {"transformer.h.0.attn.other": torch.ones(2)}, "1 weights not part of the model"),
        ("gpt2", lambda w: w | {"transformer.ln_f.weight": torch.ones(7)}, "has shape (7,)"),
    ],
)
def test_an_incomplete_decoder_is_refused(family, change, message, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    assert message in refusal(load_model, tmp_path)


def test_a_gpt2_file_as_the_hub_has_it(tmp_path):
    """Names without their prefix, and the causal mask and its fill value among the weights."""
    saved = make_model("gpt2")
    saved.save_pretrained(tmp_path)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    edit_weights(tmp_path, lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items()} | masks)
    loaded = load_model(str(tmp_path), device="cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.state_dict().items())


def test_an_untied_model_without_its_head_is_refused(copy):
    """transformers 5 would use the input embedding as the head of a FLAN-T5, and report nothing missing."""
    edit_config(copy, tie_word_embeddings=False)
    assert load_model(str(copy), device="cpu").lm_head.weight.shape == (60, 32)
    edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"the head is not tied, but the weights lack lm_head\.weight"):
        load_model(str(copy), device="cpu")


def test_a_missing_shard_is_named(tmp_path):
    make_t5().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuses(ModelError, f"{shard.name}: is missing", load_model, str(tmp_path), device="cpu")


def test_a_tokenizer_with_no_end_or_one_too_many_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(tmp_path / "none")
    assert "no end-of-sequence token" in refusal(load_tokenizer, tmp_path / "none")
    folder = save_decoder(tmp_path / "always", tokenizer=make_tokenizer())
    expected = "ends every text with '</s>', but a decoder-only model goes on"
    assert expected in refusal(load_tokenizer, folder)


def test_a_config_that_cant_be_read(tmp_path):
    edit_config(save_decoder(tmp_path), model_type="no-such")
    assert "can't be loaded" in refusal(is_encoder_decoder, tmp_path)


def test_what_is_no_folder(good):
    for name in ("./nowhere", "/no/such/folder", "https://user:secret@host/model"):
        assert "no such folder" in refusal(resolve_folder, name)
    assert "is a file" in refusal(resolve_folder, good / "config.json")
    slip = good.with_name(f"{good.name[:-1]}x")
    assert refusal(resolve_folder, slip) == f"{slip}: no such folder; did you mean {good}?"


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "owner/name-that-is-nowhere"
    assert refusal(load_tokenizer, name).startswith(f"{name}: no such folder, and the Hugging Face Hub")
