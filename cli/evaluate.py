from __future__ import annotations

from ketchup_cache.config.commands import EvaluateConfig

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

    return evaluate(config)
