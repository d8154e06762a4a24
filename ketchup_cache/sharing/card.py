"""The dataset card of a cache on the Hugging Face Hub: what it holds, who made it, how to use it."""

from __future__ import annotations

from collections.abc import Sequence

from ketchup_cache.cache.manifest import Manifest, PromptsInfo, RolloutsInfo, ScoresInfo

MARK = "<!-- written by ketchup-cache: it is replaced at the next push; without this line it stays as it is -->"


def card(repo: str, manifests: Sequence[Manifest], license_id: str) -> str:
    """README.md with its YAML header. Names come from manifests, which others may have written: they are quoted."""
    infos = [m.info for m in manifests]
    rows = {kind: sum(m.rows for m in manifests if m.kind == kind) for kind in ("prompts", "rollouts", "scores")}
    tokens = sum(m.tokens for m in manifests if m.kind == "rollouts")
    size = sum(file.length for m in manifests for file in m.files.values())
    lines = [
        ("teacher", {f"{i.teacher.name} ({i.teacher.dtype})" for i in infos if isinstance(i, ScoresInfo)}),
        ("policy", {i.policy.name for i in infos if isinstance(i, RolloutsInfo)}),
        ("tokenizer", {i.tokenizer.name for i in infos}),
        ("task", {i.data.name for i in infos if isinstance(i, PromptsInfo)}),
        ("author", {m.author for m in manifests if m.author}),
        ("written by", {m.tool for m in manifests}),
    ]
    table = [f"| {what} | {', '.join(map(_quoted, sorted(values))) or 'none'} |" for what, values in lines]
    counts = [f"| {kind} | {count:,} rows |" for kind, count in rows.items()]
    return "\n".join(
        [
            "---",
            f"license: {license_id}",
            "tags: [ketchup-cache, knowledge-distillation]",
            "---",
            MARK,
            "",
            f"# {repo.partition('/')[2]}",
            "",
            "Rollouts of a language model and a frozen teacher's scores of every token, as a ketchup cache (Zarr v3).",
            "",
            "| | |",
            "| --- | --- |",
            *table,
            *counts,
            f"| completion tokens | {tokens:,} |",
            f"| size | {size:,} bytes in {len(manifests):,} segments |",
            "",
            "    pip install ketchup-cache",
            f"    ketchup-cache learn --student STUDENT --cache hf://datasets/{repo} --out run",
            f"    ketchup-cache pull hf://datasets/{repo} cache",
            "",
        ]
    )


def _quoted(name: str) -> str:
    safe = "".join(c if c.isprintable() and c not in "`|<>" else "�" for c in name)
    return f"`{safe}`"
