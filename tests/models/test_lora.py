"""Folders of LoRA adapters: against peft's own models, and what is refused."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ketchup_cache.config.options import StudentOptions
from ketchup_cache.errors import ModelError
from ketchup_cache.models import lora
from ketchup_cache.models.fingerprint import state_fingerprint, weights_fingerprint
from ketchup_cache.models.folders import ADAPTER, ADAPTER_WEIGHTS, ORIGIN
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer
from tests.helpers.errors import refuses
from tests.helpers.lora import save_adapter, whole
from tests.helpers.models import edit_config, make_decoder_tokenizer, make_model, make_tokenizer, save_model


def save(family, folder):
    make_model(family).save_pretrained(folder)
    (make_tokenizer() if "t5" in family else make_decoder_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    """A base and an adapter of it, without a tokenizer."""
    base = save_model(tmp_path / "base", "1.1", seed=1)
    save_adapter(base, tmp_path / "adapter")
    return base, tmp_path / "adapter"


def edit(folder, **values):
    file = folder / ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
def logits(model):
    ids = torch.arange(3, 12)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"o": 3}, "rank_pattern": {"q": 2}}])
@pytest.mark.parametrize("family", ["t5-1.1", "t5-1.0", "qwen2-tied", "gpt2", "bart"])
def test_it_is_the_model_that_peft_makes_of_it(family, options, tmp_path):
    base, folder = save(family, tmp_path / "base"), tmp_path / "adapter"
    wanted = logits(save_adapter(base, folder, **options))
    assert (wanted - logits(whole(base))).abs().max() > 0.01
    merged, beside = (
        load_model(str(folder), device="cpu"),
        load_model(str(folder), device="cpu", fit=StudentOptions()),
    )
    for model in (merged, beside):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == whole(base).state_dict().keys()
    assert all(weight.requires_grad == ("lora_" in key) for key, weight in beside.named_parameters())
    lora.save(beside, tmp_path / "again")
    again = PeftModel.from_pretrained(whole(base), tmp_path / "again")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)
    assert state_fingerprint(beside) == weights_fingerprint(folder) == weights_fingerprint(tmp_path / "again")
    assert is_encoder_decoder(str(folder)) == merged.config.is_encoder_decoder
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(base)).get_vocab()


def test_what_tells_two_adapters_apart(pair, tmp_path):
    base, folder = pair
    first = weights_fingerprint(folder)
    found = [first, weights_fingerprint(base)]
    shutil.copytree(base, tmp_path / "elsewhere")
    edit(folder, base_model_name_or_path=str(tmp_path / "elsewhere"), inference_mode=False, lora_dropout=0.1)
    assert weights_fingerprint(folder) == first
    edit(folder, lora_alpha=9)
    found.append(weights_fingerprint(folder))
    edit(folder, lora_alpha=8, use_rslora=True)
    found.append(weights_fingerprint(folder))
    edit(folder, use_rslora=False, base_model_name_or_path=str(save_model(tmp_path / "other", "1.1", seed=2)))
    found.append(weights_fingerprint(folder))
    edit(folder, base_model_name_or_path=str(base))
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
        ({"bias": "all"}, "adapter with bias 'all'"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./gone"}, "the base of this adapter .*: ./gone: no such folder"),
        ({"base_model_name_or_path": "owner/gone", "revision": "abc"}, "owner/gone: no such folder, and the Hugging"),
        ({"base_model_name_or_path": "SELF"}, "has no config.json, so it is not a model folder"),
        (drop_a_weight, "adapter: its weights do not fit .* is in one of them"),
        ({"r": 3}, "its weights do not fit"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "can't be loaded .No such file"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x"), "can't be loaded"),
        (lambda folder: (folder / ORIGIN).write_text('{"base": "0123"}'), "is not the model that this adapter was tr"),
        ({"target_modules": ["lm_head"]}, "an adapter of lm_head is not supported"),
        ({"target_modules": ["nothing"]}, "can't be loaded .Target modules"),
    ],
)  # fmt: skip
def test_an_unusable_adapter_is_refused_in_one_line(pair, change, message):
    folder = pair[1]
    if callable(change):
        change(folder)
    else:
        edit(folder, **{key: str(folder) if value == "SELF" else value for key, value in change.items()})
    refuses(ModelError, message, load_model, str(folder), device="cpu")


def test_options_that_do_not_fit_the_folder(pair, monkeypatch):
    base, folder = map(str, pair)
    new = StudentOptions(lora_rank=2)
    refuses(ModelError, "is an adapter of rank 4 already", load_model, folder, device="cpu", fit=new)
    refuses(ModelError, "nothing for --lora-merge", load_model, base, device="cpu", fit=StudentOptions(lora_merge=True))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refuses(ModelError, "pip install 'ketchup-cache", load_model, base, device="cpu", fit=new)
    edit_config(pair[0], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses(ModelError, "QLoRA", load_model, base, device="cpu", fit=new)


def test_the_base_may_stand_beside_where_the_command_runs(pair, monkeypatch):
    """As peft reads it; what is written names it so that it is found from everywhere."""
    base, folder = pair
    edit(folder, base_model_name_or_path="base")
    monkeypatch.chdir(base.parent)
    lora.save(load_model(str(folder), device="cpu", fit=StudentOptions()), folder)
    monkeypatch.chdir(os.sep)
    assert json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"] == str(base)
    assert logits(load_model(str(folder), device="cpu")).isfinite().all()
