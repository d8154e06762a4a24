"""Where the files that come with the package are: recipes, and the small tasks with their teachers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

RECIPES = Path(str(files("ketchup_cache"))) / "config" / "recipes"


def recipe(name: str) -> Path:
    """YAML file of a recipe; it need not exist."""
    return RECIPES / f"{name}.yaml"


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def task(name: str) -> Path:
    """Folder of a shipped task: train.jsonl, test.jsonl, teacher/, student/."""
    return Path(str(files("ketchup_cache.data"))) / name
