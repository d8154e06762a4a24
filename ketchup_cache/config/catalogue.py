"""What recipes there are, and the commands that run one from data to result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ketchup_cache.config.resolve import find_recipe, load_yaml
from ketchup_cache.console import Report
from ketchup_cache.shipped import recipe_names

COMMANDS = """\
ketchup-cache pretrain --recipe {name} --model {finetune} --data {data} --out teacher
ketchup-cache rollout --recipe {name} --student {teacher} --greedy --cache sft
ketchup-cache pretrain --recipe {name} --cache sft --out predistilled
ketchup-cache rollout --recipe {name} --student predistilled/best --first 4096 --cache cache
ketchup-cache score --recipe {name} --cache cache
ketchup-cache learn --recipe {name} --student predistilled/best --cache cache --out k{k}
ketchup-cache evaluate --recipe {name} --model k{k}/best"""
"""The first is left out where no `about.finetune` names the model that becomes the teacher."""


@dataclass(frozen=True)
class Catalogue(Report):
    """Of each recipe: name, task, teacher, student, and the paper's table or figure as `source`."""

    recipes: tuple[dict[str, str], ...]

    def __str__(self) -> str:
        lines = ["{name:<20} {task:<27} {teacher} → {student}, {source}".format(**recipe) for recipe in self.recipes]
        return "\n".join([*lines, "", "`ketchup-cache recipes NAME` prints one with the commands to run."])


@dataclass(frozen=True)
class Recipe(Report):
    """options: those of its file and of the recipe that it extends. commands: from the data to the result."""

    name: str
    about: dict[str, str]
    options: dict[str, Any]
    commands: tuple[str, ...]

    def __str__(self) -> str:
        file = find_recipe(self.name).read_text(encoding="utf-8")
        return "\n".join([f"# {self.name}.yaml\n{file}", "# Commands, in order:", *self.commands])


def catalogue() -> Catalogue:
    """All shipped recipes, by name."""
    return Catalogue(tuple({"name": name, **load_yaml(find_recipe(name))["about"]} for name in recipe_names()))


def one_recipe(name: str) -> Recipe:
    """Raises ConfigError where there is no such recipe."""
    options = load_yaml(find_recipe(name))
    about = options.pop("about")
    places = {"teacher": options["teacher"], "data": options["rollout"]["data"], "k": options["learn"]["k"]}
    commands = COMMANDS.format_map({"finetune": None, "name": name} | about | places).splitlines()
    return Recipe(name, about, options, tuple(commands if "finetune" in about else commands[1:]))
