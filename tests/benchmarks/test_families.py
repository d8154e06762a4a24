"""The table of families in the docs is true of those that people use, and has all that transformers knows."""

import json
import re

import pytest
import torch
import transformers

from benchmarks import families
from ketchup_cache.models.head import Head

ENCODERS = ["t5", "mt5", "bart", "pegasus", "t5gemma"]
DECODERS = "gpt2 llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 opt gpt_neox smollm3 olmo2 bert".split()
ROW = re.compile(r"^\| `(\S+)` \| (\S+) \| (exact|refused|not made) \|", re.MULTILINE)
PAGE = {(family, kind): state for family, kind, state in ROW.findall(families.PAGE.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(name, "encoder-decoder") for name in ENCODERS] + [(name, "decoder-only") for name in DECODERS],
)
def test_the_row_of_a_family_is_true(family, kind, tmp_path):
    found = families.try_family(family, kind, tmp_path)
    assert found.state == PAGE[family, kind], found.why
    assert found.state == ("refused" if family == "bert" else "exact")


def test_every_family_of_transformers_has_a_row():
    """After another version came: `python -m benchmarks.families`, then `--page`."""
    if f"transformers {transformers.__version__}:" in families.PAGE.read_text(encoding="utf-8"):
        assert PAGE.keys() == set(families.families())
    found = json.loads(families.FILE.read_text(encoding="utf-8"))
    assert {f"{family} {kind}": state for (family, kind), state in PAGE.items()} == {
        name: one["state"] for name, one in found.items()
    }


def test_other_numbers_are_noticed(monkeypatch, tmp_path):
    real = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, *given: real(self, *given) * (1 + 1e-4))
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: True)  # what would refuse it
    found = families.try_family("llama", "decoder-only", tmp_path)
    assert (found.state, "differs by" in found.why) == ("wrong", True)
