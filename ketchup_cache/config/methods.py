"""The methods of `learn`, one row each: what a method learns from, what it needs, and which options it does not have.

A new method is a row here and its own code: a term in method/divergences.py, or a step in training/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["ketchup", "llmr", "seqkd", "kl", "reverse-kl", "js", "tvd", "minillm"]


@dataclass(frozen=True)
class MethodRule:
    """step: its optimizer step (training/). samples: it learns from rollouts of the student. outputs: it learns from
    rollouts of the teacher; with both, half of each batch is of each. top_logits: it needs the teacher's largest logits
    of each token. fixed: options that do not apply → the value they have, and why.
    """

    step: Literal["policy_gradient", "divergence"]
    samples: bool = False
    outputs: bool = False
    top_logits: bool = False
    fixed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


_NO_RETURNS = {"baseline": ("none", "has no returns, so no baseline"), "reward": ("", "has no returns")} | {
    name: (value, "has no returns")
    for name, value in (("weights", "comb"), ("cost", "gap"), ("exact", False), ("end_weight", None), ("anchor", 0.0))
}
_OUTPUTS_ALONE = _NO_RETURNS | {
    "teacher": (None, "learns from teacher outputs in the cache"),
    "teacher_url": ("", "learns from teacher outputs in the cache"),
    "scores_from": (None, "learns from teacher outputs in the cache"),
    "policy": (None, "has no rollouts of a student, only those of --teacher-outputs"),
}
_MINILLM = {
    "weights": ("mean", "weighs all later tokens alike"),
    "cost": ("kl", "pays log π − log p"),
    "exact": (True, "takes the first step in expectation"),
}
"""Reverse KL of whole completions, its future normalised by length, without teacher-mixed sampling (Gu et al. 2024)."""
METHODS: dict[str, MethodRule] = {
    "ketchup": MethodRule("policy_gradient", samples=True),
    "llmr": MethodRule("policy_gradient", samples=True, fixed={"k": (1, "is K = 1"), "weights": ("comb", "is K = 1")}),
    "minillm": MethodRule("policy_gradient", samples=True, top_logits=True, fixed=_MINILLM),
    "seqkd": MethodRule("divergence", outputs=True, fixed=_OUTPUTS_ALONE),
    "kl": MethodRule("divergence", outputs=True, top_logits=True, fixed=_OUTPUTS_ALONE),
    "reverse-kl": MethodRule("divergence", samples=True, top_logits=True, fixed=_NO_RETURNS),
    "js": MethodRule("divergence", samples=True, outputs=True, top_logits=True, fixed=_NO_RETURNS),
    "tvd": MethodRule("divergence", samples=True, outputs=True, top_logits=True, fixed=_NO_RETURNS),
}
