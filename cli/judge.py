from __future__ import annotations

from ketchup_cache.config.commands import JudgeConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache judge k4.jsonl kl.jsonl --judge-model Qwen/Qwen2.5-72B-Instruct \\",
        "    --base-url http://127.0.0.1:8000/v1 --limit 500",
    ],
    positional=["system", "baseline"],
)
def judge(config: JudgeConfig) -> Result:
    """Win rates of one system's outputs over another's, by a language model (Table 2)."""
    from ketchup_cache.report.judge import judge

    return judge(config)
