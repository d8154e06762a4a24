from __future__ import annotations

from ketchup_cache.config.commands import ShowConfig

from .app import Result, command

EXAMPLES = """ketchup-cache show train.jsonl --template 'Translate: {prompt}' --tokenizer google-t5/t5-small
ketchup-cache show cache --rows 20:30 --color return --k 4
ketchup-cache show run --rows 7
ketchup-cache show outputs.jsonl"""


@command(examples=EXAMPLES.split("\n"), positional=["what"])
def show(config: ShowConfig) -> Result:
    """Print rows of data, a cache, a run or outputs as the model sees them: prompt, completion, its ending, scores."""
    from ketchup_cache.report.show import show

    return show(config)
