from __future__ import annotations

from ketchup_cache.config.commands import ExportConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache export cache rows --to parquet",
        "ketchup-cache export s3://lab/xsum rows --to hf-dataset --scored-by google/flan-t5-xl",
    ],
    positional=["cache", "out"],
)
def export(config: ExportConfig) -> Result:
    """Write the scored rollouts of a cache as Parquet or as a Hugging Face dataset, one row each.

    docs/sharing.md names the columns. What the cache guarantees of its bytes ends here: other tools check nothing.
    """
    from ketchup_cache.report.export import export

    return export(config)
