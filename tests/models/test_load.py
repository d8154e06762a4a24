import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import NewGELUActivation

from ketchup_cache.errors import ModelError
from ketchup_cache.models.load import load_model, load_tokenizer, pick_device, resolve_folder
from tests.helpers.models import make_t5, make_tokenizer, save_decoder, save_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "1.1")


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_saved_model_comes_back_as_it_was(version, tmp_path):
    saved = make_t5(version)
    saved.train().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert not loaded.training
    assert loaded.config.scale_decoder_outputs == (version == "1.0")
    assert (loaded.lm_head.weight is loaded.shared.weight) == (version == "1.0")
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_the_fused_gelu_is_the_models_own_function(family, tmp_path):
    """No farther than transformers' own from its model in float64; and there must have been one to fuse."""
    if family == "t5":
        save_model(tmp_path, "1.1")
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        inputs = {"input_ids": torch.arange(3, 20)[None], "decoder_input_ids": torch.arange(9)[None]}
    else:
        save_decoder(tmp_path, "gpt2")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        inputs = {"input_ids": torch.arange(3, 20)[None]}
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


def test_bfloat16_bodies(good):
    assert load_model(str(good), dtype="bfloat16", device="cpu").lm_head.weight.dtype == torch.bfloat16


def test_device_maps(good):
    assert load_model(str(good), device_map="cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_weights(d, lambda w: w.pop("encoder.final_layer_norm.weight")), "1 weights missing (first:"),
        (lambda d: edit_weights(d, lambda w: w.update(extra=torch.zeros(2))), "1 weights not part of the model"),
        (lambda d: edit_weights(d, lambda w: w.update({"lm_head.weight": torch.zeros(61, 32)})), "has shape (61, 32)"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x02"), "is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json"), "is damaged"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pickled .bin ones"),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights in safetensors format"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: can't be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: is not a JSON object"),
        (lambda d: edit_config(d, model_type="no-such-architecture"), "can't be loaded"),
        (lambda d: edit_config(d, model_type="gpt2", is_encoder_decoder=False), "config.json makes it (60, 768)"),
        (lambda d: edit_config(d, model_type="vit", is_encoder_decoder=False), "vit is not a language model"),
        (lambda d: edit_config(d, model_type="whisper", vocab_size=60), "whisper is not a language model"),
    ],
)  # fmt: skip
def test_an_unusable_folder_is_refused_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelError) as refused:
        load_model(str(copy), device="cpu")
    assert message in str(refused.value)
    assert str(copy) in str(refused.value)
    assert "\n" not in str(refused.value)


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
    with pytest.raises(ModelError, match=f"{shard.name}: is missing"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "holds no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer can't be loaded"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer can't be loaded"),
    ],
)
def test_an_unusable_tokenizer_is_refused_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelError) as refused:
        load_tokenizer(str(copy))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "https://user:secret@host/model"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ModelError, match="no such folder"):
        resolve_folder(name)


def test_a_file_is_not_a_folder(good):
    with pytest.raises(ModelError, match="is a file"):
        resolve_folder(str(good / "config.json"))


def test_the_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"^owner/name-that-is-nowhere: no such folder, and the Hugging Face Hub"
    ) as refused:
        load_tokenizer("owner/name-that-is-nowhere")
    assert "\n" not in str(refused.value)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for device in ("cuda:99", "cpu:1", "xpu"):
        with pytest.raises(ModelError, match="is not on this machine"):
            pick_device(device)
    with pytest.raises(ModelError, match="is not a device name"):
        pick_device("gpu")


def test_float16_is_not_offered(good):
    with pytest.raises(ModelError, match="use float32 or bfloat16"):
        load_model(str(good), dtype="float16")
