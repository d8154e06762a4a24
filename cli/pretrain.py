from __future__ import annotations

from ketchup_cache.config.commands import PretrainConfig

from .app import Result, command


@command(
    examples=[
        "# pre-distillation: learn a teacher's own outputs",
        "ketchup-cache rollout --student google/flan-t5-xl --greedy --data xsum.jsonl --cache sft",
        "ketchup-cache pretrain --model google-t5/t5-base --cache sft --out student",
        "",
        "# teacher fine-tuning: learn references",
        "ketchup-cache pretrain --model google/flan-t5-xl --data train.jsonl --out teacher",
        "",
        "# conversations: rows with a column `messages`; all turns of the assistant",
        "ketchup-cache pretrain --model Qwen/Qwen3-0.6B --data chats.jsonl --out chat",
    ]
)
def pretrain(config: PretrainConfig) -> Result:
    """Train by cross-entropy, on references or on a teacher's outputs."""
    from ketchup_cache.training.pretrain import pretrain

    return pretrain(config)
