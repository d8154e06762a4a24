"""The README.md in a trained model's folder: where the model comes from, as the Hub shows it. Every name is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ketchup_cache.cache.cache import Cache
from ketchup_cache.errors import ConfigError
from ketchup_cache.files import write_file
from ketchup_cache.models.origin import Origin
from ketchup_cache.text.tokens import visible

CARD = """---
library_name: {library}
tags: [knowledge-distillation, ketchup-cache]
{base}---

# A model trained by `ketchup-cache {command}`

| | |
| --- | --- |
{rows}

The options of the run:

| option | value |
| --- | --- |
{options}
"""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    made: Mapping[str, Any], origin: Origin, variants: Mapping[str, str], cache: Cache | None, pins: Sequence[str]
) -> str:
    """made: what config.json holds. variants: which variant each metric of `origin` is. cache, pins: what was read."""
    options = made["options"]
    model = str(options.get("student") or options.get("model"))
    base = f"base_model: {model}\n" if HUB_ID.fullmatch(model) and not Path(model).exists() else ""

    def facts() -> Iterator[tuple[str, object]]:
        yield "trained from", f"{model} ({made['resolved'].get('student') or made['resolved'].get('model')})"
        yield "after", f"{origin.step} of {made['resolved']['steps']} optimizer steps"
        for policy in origin.pretrained_on:
            yield "pre-distilled on the outputs of", f"{policy.name} ({policy.fingerprint})"
        manifests = [cache.entry(id_) for id_ in pins] if cache else []
        infos = dict.fromkeys(manifest.info for manifest in manifests)
        for key, what in (("teacher", "teacher"), ("data", "prompts")):
            for one in dict.fromkeys(getattr(info, key) for info in infos if hasattr(info, key)):
                yield what, f"{one.name} ({one.fingerprint})"
        if options.get("data"):
            yield "references", f"{options['data']} ({made['resolved']['data']})"
        for name, value in origin.metrics.items():
            yield f"{name} on {options['eval_data']}", f"{value:.4f}"
        yield from variants.items()
        if cache:
            yield "cache", f"{cache.address}, {len(pins)} segments: {' '.join(id_[:12] for id_ in pins)}"
        yield "made by", ", ".join([made["tool"], *(f"{name} {value}" for name, value in made["versions"].items())])

    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items() if k != "out"}
    parts = {"base": base, "library": "peft" if origin.base else "transformers", "command": made["command"]}
    return CARD.format(**parts, rows=_rows(facts()), options=_rows(texts.items()))


def card_of(model: str) -> Path:
    """File of a model's card. Raises ConfigError where its folder has none."""
    card = Path(model) / "README.md"
    if not card.is_file():
        raise ConfigError([f"--card: {model} has no README.md; give the folder of a trained model, as run/best"])
    return card


def add_evaluation(card: Path, report: Mapping[str, Any]) -> None:
    """Put a table of these metrics into a card, in place of that of the same data. report: as `Evaluation` has it.
    Raises WriteError."""
    title = f"## On {escaped(report['data'])}\n"
    facts: dict[str, object] = {"examples": report["examples"], **(report["metrics"] or {})}
    facts |= {"mean length": f"{report['length_mean']:.2f} tokens", "finished": f"{100 * report['finished']:.1f} %"}
    if returns := report["returns"]:
        facts["mean return under {teacher} ({normalization})".format(**returns)] = f"{returns['mean']:.4f}"
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in facts.items()}
    others = [part for part in card.read_text(encoding="utf-8").split("\n\n## ") if not f"## {part}".startswith(title)]
    table = f"{title}\nGreedy outputs.\n\n| | |\n| --- | --- |\n{_rows(shown.items())}\n"
    write_file(card, "\n\n".join(["\n\n## ".join(others).rstrip("\n"), table]).encode())


def _rows(facts: Any) -> str:
    return "\n".join(f"| {escaped(name)} | {escaped(str(value))} |" for name, value in facts)


def escaped(text: str) -> str:
    """As text in a cell of a table: no markup, no HTML, no link that makes itself, nothing invisible."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~$&:@])", r"\\\1", visible(text).replace("\n", " ")).replace("www.", "www\\.")
