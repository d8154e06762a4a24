"""What recipes there are, and the commands that run one from data to result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ketchup_cache.config.resolve import find_recipe, load_yaml
from ketchup_cache.shipped import recipe_names


@dataclass(frozen=True)
class Summary:
    """One line of the list. `about` says where the settings come from."""

    name: str
    task: str
    teacher: str
    student: str
    about: str


@dataclass(frozen=True)
class Catalogue:
    recipes: tuple[Summary, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("recipe", "task", "teacher → student", ""), *map(_row, self.recipes)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        return "\n".join([*lines, "", "`ketchup-cache recipes NAME` prints one with the commands to run."])


@dataclass(frozen=True)
class Recipe:
    """One recipe: its file as it stands, all its options with those of the recipe below it, commands in order."""

    summary: Summary
    files: tuple[str, ...]
    options: dict[str, Any]
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.summary) | {"options": self.options, "commands": list(self.commands)}

    def __str__(self) -> str:
        return "\n".join([*(text.rstrip() + "\n" for text in self.files), "# Commands, in order:", *self.commands])


def catalogue() -> Catalogue:
    """All shipped recipes, by name."""
    return Catalogue(tuple(_summary(name, load_yaml(find_recipe(name))) for name in recipe_names()))


def one_recipe(name: str) -> Recipe:
    """Raises ConfigError where there is no such recipe."""
    options = load_yaml(find_recipe(name))
    files, link = [], name
    while link:
        text = find_recipe(link).read_text(encoding="utf-8")
        files.append(f"# --- {link}.yaml\n{text}")
        link = next((line.split()[1] for line in text.splitlines() if line.startswith("extends:")), "")
    shown = {key: value for key, value in options.items() if key not in ("about", "extends")}
    return Recipe(_summary(name, options), tuple(files), json.loads(json.dumps(shown)), _commands(name, options))


def _summary(name: str, options: dict[str, Any]) -> Summary:
    about = options["about"]
    return Summary(name, about["task"], about["teacher"], about["student"], about["source"])


def _row(summary: Summary) -> tuple[str, str, str, str]:
    return summary.name, summary.task, f"{summary.teacher} → {summary.student}", summary.about


def _commands(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    """From the data to the result. `about.finetune` names the model that becomes the teacher first."""

    def line(command: str, *flags: str) -> str:
        return " ".join(["ketchup-cache", command, "--recipe", name, *flags])

    base = options["about"].get("finetune")
    data = options["rollout"]["data"]
    k = f"k{options['learn']['k']}"
    lines = [line("pretrain", "--model", base, "--data", data, "--out", "teacher")] if base else []
    return (
        *lines,
        line("rollout", "--student", options["teacher"], "--greedy", "--cache", "sft"),
        line("pretrain", "--cache", "sft", "--out", "predistilled"),
        line("rollout", "--student", "predistilled/model", "--first", "4096", "--cache", "cache"),
        line("score", "--cache", "cache"),
        line("learn", "--student", "predistilled/model", "--cache", "cache", "--out", k),
        line("evaluate", "--model", f"{k}/student"),
    )
