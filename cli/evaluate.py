from __future__ import annotations

from ketchup_cache.config.commands import EvaluateConfig
from ketchup_cache.console import is_first

from .app import Result, command


@command(
    examples=[
        "ketchup-cache evaluate --model run/best --data test.jsonl --teacher google/flan-t5-xl",
        "ketchup-cache evaluate --model run/best --data gsm8k/test.jsonl \\",
        "    --prompt-field question --target-field answer --metrics gsm8k --max-new-tokens 300",
    ]
)
def evaluate(config: EvaluateConfig) -> Result:
    """Decode greedily; report task metrics and the mean return."""
    from ketchup_cache.evaluation.evaluate import evaluate
    from ketchup_cache.training.card import add_evaluation, card_of

    card = card_of(config.model) if config.card else None
    report = evaluate(config)
    if card and is_first():
        add_evaluation(card, report.to_dict())
    return report
