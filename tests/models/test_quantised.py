"""Quantised teachers: what they compute, what they are filed under, and what is refused."""

import importlib.util

import numpy as np
import pytest
import torch

from ketchup_cache.config.options import StudentOptions
from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.errors import ModelError
from ketchup_cache.models.load import load_model
from ketchup_cache.scoring.teacher import Teacher
from tests.helpers.errors import refuses
from tests.helpers.models import VOCAB, edit_config, save_decoder, save_model
from tests.helpers.oracle import assert_same_scores, plain_scores, random_rollouts


def rounded(model, quantised):
    """The full model with the weights that the other stands for: in each row of a linear layer but the head, one of 256
    values, the nearest to the full weight."""
    layers = dict(quantised.named_modules())
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            full, values = module.weight.detach(), layers[path].weight.dequantize().detach()
            step = full.abs().amax(1, keepdim=True) / 127.5
            assert ((values - full).abs() <= 0.501 * step).all()
            torch.testing.assert_close((values / step).round() * step, values, rtol=1e-5, atol=1e-6)
            module.weight.data = values
    return model


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_int8_weights_are_scored_as_the_rounded_ones_are(family, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'ketchup-cache[quantize]'")
    name = str(save_model(tmp_path, "1.1") if family == "t5" else save_decoder(tmp_path))
    prompts, rollouts = random_rollouts(0, 12)
    of = {how: ScoringOptions(device="cpu", quantize=how) for how in ("none", "int8")}
    teachers = {how: Teacher.load(name, options) for how, options in of.items()}
    ours = teachers["int8"].score(prompts, rollouts, batch_tokens=60)
    model = rounded(load_model(name, device="cpu"), teachers["int8"]._model)
    assert_same_scores(ours, plain_scores(model, prompts, rollouts, VOCAB))
    full = teachers["none"].score(prompts, rollouts, batch_tokens=60)
    assert abs(ours.q - full.q).max() > 0.01
    infos = {how: teacher.info for how, teacher in teachers.items()}
    teachers["int8"]._model.save_pretrained(tmp_path)  # and is read as it was saved
    saved = Teacher.load(name, ScoringOptions(device="cpu"))
    np.testing.assert_array_equal(saved.score(prompts, rollouts, batch_tokens=60).q, ours.q)
    assert infos["int8"].dtype == "float32, int8"
    assert infos["int8"].fingerprint != infos["none"].fingerprint


def test_what_is_not_to_be_had_is_one_line(tmp_path, monkeypatch):
    name = str(save_decoder(tmp_path / "model"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = r"--quantize int8 needs torchao: pip install 'ketchup-cache\[quantize\]'"
    refuses(ModelError, message, load_model, name, device="cpu", quantize="int8")
    refuses(ModelError, "--quantize bnb-nf4 is not for a CPU", load_model, name, device="cpu", quantize="bnb-nf4")
    edit_config(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    refuses(ModelError, r"is quantised already \(gptq\)", load_model, name, device="cpu", quantize="int8")
    refuses(ModelError, "such weights are not trained", load_model, name, device="cpu", fit=StudentOptions())
    refuses(ModelError, "can't be loaded", load_model, name, device="cpu")  # without the package that reads it
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model.gguf")
    refuses(ModelError, "only .gguf ones: make full weights of them", load_model, name, device="cpu")
