"""Adapters made by peft alone."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM


def whole(folder: Path):
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def save_adapter(base: Path, folder: Path, *, seed=0, spread=0.05, basis=False, **options):
    """Of a base, with B at random, of this standard deviation; basis: A is the unit matrix. Returns peft's model."""
    torch.manual_seed(seed)
    model = get_peft_model(whole(base), LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, spread) if spread else parameter.zero_()
            if ".lora_A." in name and basis:
                torch.nn.init.eye_(parameter)
    model.save_pretrained(folder)
    return model.eval()
