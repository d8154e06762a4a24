"""The command line: `ketchup-cache`. One file per command; all options come from `ketchup_cache.config.commands`."""

from .app import app, main

# Importing a command's module puts it on the app, in the order of `--help`.
from . import demo, recipes, env, pretrain, rollout, score, learn, evaluate, compare, analyze, show, report  # isort: skip  # noqa: F401
from . import info, verify, push, pull, merge, export  # isort: skip  # noqa: F401

__all__ = ["app", "main"]
