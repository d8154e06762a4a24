from __future__ import annotations

from ketchup_cache.config.commands import CompareConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache evaluate --model start --data test.jsonl --outputs start.jsonl",
        "ketchup-cache evaluate --model run/best --data test.jsonl --outputs best.jsonl",
        "ketchup-cache compare start.jsonl best.jsonl",
    ],
    positional=["a", "b"],
)
def compare(config: CompareConfig) -> Result:
    """Test whether one model is better than another: paired bootstrap of every metric, and examples."""
    from ketchup_cache.evaluation.compare import compare

    return compare(config)
