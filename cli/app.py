"""Turns a config class into a command: flags from its fields, help from their docstrings, errors in one line."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import sys
import typing
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TextIO

import typer
import typer.core
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.config.names import ADVANCED, MOST_USED, did_you_mean
from ketchup_cache.config.resolve import flag, resolve
from ketchup_cache.config.values import Config, Positive, split_list
from ketchup_cache.console import is_first
from ketchup_cache.errors import ConfigError, KetchupError, printable
from ketchup_cache.parallel.group import first_to_fail, group, leave, started
from ketchup_cache.shipped import recipe
from ketchup_cache.version import __version__

app = typer.Typer(
    name="ketchup-cache",
    help="Distil language models by K-step reinforcement learning, from a teacher's scores computed once.",
    rich_markup_mode="markdown",
    suggest_commands=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

WIDEST = 20
"""Letters of choices that still stand beside an option in help; more stand in its text."""

# Newer releases of Typer carry a Click of their own; its errors have no public name there.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


EXAMPLES: dict[str, Sequence[str]] = {}
"""Of each command, lines of its help."""
COMMAND_PANELS = {
    **dict.fromkeys(("pretrain", "rollout", "score", "learn"), "Distil"),
    **dict.fromkeys(("evaluate", "compare", "analyze", "show", "report"), "Look and compare"),
    **dict.fromkeys(("info", "verify", "push", "pull", "merge", "export"), "Caches"),
    **dict.fromkeys(("demo", "recipes", "env"), "Begin"),
}


# What went away → what does the same now. For one release.
GONE_COMMANDS = {
    "compact": "ketchup-cache score --storage float16",
    "diff": "ketchup-cache info CACHE OTHER",
    "gc": "ketchup-cache verify CACHE --clean",
    "judge": "python examples/judge.py",
    "ls": "ketchup-cache info CACHE",
}
GONE_OPTIONS = {
    ("score", "--watch"): "--follow with --cache",
    ("score", "--idle-exit"): "--until-idle",
    ("learn", "--scorer"): "--scores-from",
    ("learn", "--scorer-timeout"): "--scores-timeout",
}


SEVERAL = ("pretrain", "rollout", "score", "learn", "evaluate")
"""Commands that a launcher (torchrun) may start in several processes."""


class Result(Protocol):
    """What a command returns: a text for people and a dictionary for `--json`. shaded: as of `Report`."""

    @property
    def shaded(self) -> bool: ...
    def to_dict(self) -> dict[str, Any]: ...
    def __str__(self) -> str: ...


def command(
    examples: Sequence[str], positional: Sequence[str] = ()
) -> Callable[[Callable[[Any], Result]], Callable[[Any], Result]]:
    """Put a function `name(config) -> Result` on the app as the command `name`."""

    def register(run: Callable[[Any], Result]) -> Callable[[Any], Result]:
        name = run.__name__
        fields, panels = COMMANDS[name].model_fields, panels_of(name)

        def invoke(**flags: Any) -> None:
            config_file, recipe_name, as_json = (flags.pop(key) for key in ("config", "recipe", "as_json"))
            try:
                config = resolve(name, _config_path(config_file), flags, recipe_name)
            except ConfigError as error:  # an argument is typed without a name
                words = {flag(key): key.upper() for key in positional}
                parts = (problem.split(" ", 1) for problem in error.problems)
                raise ConfigError([" ".join([words.get(first, first), *rest]) for first, *rest in parts]) from None
            if started() and name not in SEVERAL:
                raise ConfigError([f"`{name}` works in one process: start it without torchrun"])
            group()
            try:
                result = run(config)
            except KeyboardInterrupt:  # of which Typer would make an exit without a word
                raise typer.Abort from None
            leave()
            if not is_first():
                return
            if as_json:
                utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
                plain = not utf8 or sys.stdout.isatty()  # marks that turn a line of a terminal round are escaped too
                print(json.dumps(result.to_dict(), ensure_ascii=plain, allow_nan=False))
            else:
                print(result) if result.shaded else _print(str(result), sys.stdout)
            watched = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
            if watched and (page := getattr(result, "page", "")) and typer.confirm(f"Open {page} in the browser?"):
                webbrowser.open(Path(page).resolve().as_uri())
            if getattr(result, "ok", True) is False:
                raise typer.Exit(2)

        parameters = [_parameter(key, fields[key], key in positional, panel) for key, panel in panels.items()]
        parameters += [
            _option("config", str | None, "YAML file with these options. Flags win.", metavar="FILE"),
            _option(
                "recipe",
                str | None,
                "Published settings (`ketchup-cache recipes`). --config and flags win.",
                metavar="NAME",
            ),
            _option("as_json", bool, "Print the result as JSON.", words="--json", default=False),
        ]
        # Click wants arguments before options
        parameters.sort(key=lambda p: p.name not in positional)
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, cls=_Command, help=inspect.getdoc(run), rich_help_panel=COMMAND_PANELS[name])(invoke)
        EXAMPLES[name] = examples
        return run

    return register


class _Command(typer.core.TyperCommand):
    """Its help has `--help` in the last panel, and ends in examples as they are typed."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        option.rich_help_panel = "General"  # type: ignore[union-attr]
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        print(" Examples:", *(f"   {line}" for line in EXAMPLES[self.name or ""]), sep="\n")


def panels_of(command: str) -> dict[str, str]:
    """Title of the panel of each option, in the order of help."""
    config_class, used = COMMANDS[command], MOST_USED.get(command, ())
    order = ["Required", "Most used", *(_title(group) for group in config_class.__mro__), "Advanced"]
    panels = {key: _panel(config_class, key, used) for key in config_class.model_fields}
    keys = sorted(panels, key=lambda key: (order.index(panels[key]), used.index(key) if key in used else 0))
    return {key: panels[key] for key in keys}


def _title(group: type) -> str:
    """A group of options by its docstring; what a command has of its own is headed `More options`."""
    text = (group.__doc__ or "").splitlines() or [""]
    return "More options" if text[0].startswith("Options of") else text[0]


def _panel(config_class: type[Config], name: str, used: Sequence[str]) -> str:
    """Title of the panel of an option: that of the group that declares it, unless it is among the first or last."""
    if config_class.model_fields[name].is_required():
        return "Required"
    if name in used or name in ADVANCED:
        return "Most used" if name in used else "Advanced"
    return _title(next(c for c in reversed(config_class.__mro__) if name in getattr(c, "__annotations__", {})))


def _parameter(name: str, info: FieldInfo, positional: bool, panel: str) -> inspect.Parameter:
    """Every flag is read as text and checked by the config class, so that all wrong values are reported at once."""
    text = info.description or ""
    if not info.is_required() and info.default not in (None, "", (), False, PydanticUndefined):
        shown = ",".join(map(str, info.default)) if isinstance(info.default, tuple) else str(info.default)
        text += f"  [default: {shown if not isinstance(info.default, bool) else shown.lower()}]"
    by_comma = any(getattr(one, "func", None) is split_list for one in info.metadata)
    several = typing.get_origin(info.annotation) is tuple and not by_comma
    if positional:
        argument = typer.Argument(metavar=name.upper(), help=text, show_default=False, rich_help_panel="Arguments")
        return _keyword(name, list[str] | None if several else str | None, argument, None)
    if info.annotation is bool:
        both = f"{flag(name)}/--no-{name.replace('_', '-')}"
        return _option(name, bool | None, text, words=both, metavar=" ", panel=panel)
    kind, metavar = (list[str] | None, "NAME=VALUE") if several else (str | None, _metavar(info))
    if len(metavar) > WIDEST:
        text, metavar = f"{text}  [{metavar}]", "NAME"
    return _option(name, kind, text, metavar=metavar, panel=panel)


def _option(
    name: str,
    kind: Any,
    text: str,
    *,
    words: str = "",
    metavar: str | None = None,
    default: Any = None,
    panel: str = "",
) -> inspect.Parameter:
    option = typer.Option(
        words or flag(name), metavar=metavar, help=text, show_default=False, rich_help_panel=panel or "General"
    )
    return _keyword(name, kind, option, default)


def _keyword(name: str, kind: Any, declared: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declared]
    )


def _metavar(info: FieldInfo) -> str:
    if words := _choices(info.annotation):
        number = Positive in typing.get_args(info.annotation)
        return "|".join(["INT"] * number + [*words])
    inner = [t for t in typing.get_args(info.annotation) if t is not type(None)] or [info.annotation]
    names = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
    if typing.get_origin(info.annotation) is tuple:
        return "INT,INT,…" if inner[0] is int else "NAME,NAME,…"
    return names.get(inner[0], "TEXT")


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words a Literal allows, also inside `| None` and tuples; empty for other types."""
    if typing.get_origin(annotation) is Literal:
        return tuple(str(a) for a in typing.get_args(annotation))
    for inner in typing.get_args(annotation):
        if found := _choices(inner):
            return found
    return ()


def _config_path(given: str | None) -> Path | None:
    """A file, or a recipe shipped with the package."""
    if given is None:
        return None
    path, shipped = Path(given), recipe(given)
    return shipped if not path.exists() and shipped.exists() else path


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(f"ketchup-cache {__version__}")
        raise typer.Exit


def _usage(error: Any) -> str:
    """What is wrong with the words of a command line, with what was meant where that can be guessed."""
    text = error.format_message().partition(" (Possible")[0].rstrip(".")
    if wrong := re.match(r"No such command '(.*)'", text):
        return text + did_you_mean(wrong[1], COMMANDS)
    if (
        (wrong := re.match(r"No such option:? '?(--[^\s']+)", text))
        and error.ctx
        and error.ctx.command.name in COMMANDS
    ):
        return text + did_you_mean(wrong[1], COMMANDS[error.ctx.command.name].model_fields, flag)
    return text


def _gone(arguments: Sequence[str]) -> str | None:
    """What to use in place of a command or an option that went away."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    if command in GONE_COMMANDS:
        return f"`{command}` is gone: use `{GONE_COMMANDS[command]}`"
    for word in arguments:
        if instead := GONE_OPTIONS.get((command, word.partition("=")[0])):
            return f"`{command} {word.partition('=')[0]}` is gone: use {instead}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    if arguments is None and sys.getfilesystemencoding() != "utf-8":  # names of files could not be given to libraries
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character gets a question mark
            stream.reconfigure(errors="replace")
    debug = "--debug" in arguments
    # accepted before or after the command
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    if gone := _gone(arguments):
        print(f"ketchup-cache: {gone}", file=sys.stderr)
        return 2
    try:
        return app(arguments, standalone_mode=False) or 0
    except KetchupError as error:
        if debug:
            raise
        for line in str(error).split("\n") if first_to_fail() else ():
            _print(f"ketchup-cache: {line}")
        return 2
    except _UsageError as error:
        if is_first():
            _print(f"ketchup-cache: {_usage(error)}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        if first_to_fail():
            print("ketchup-cache: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (OSError, MemoryError) as error:
        # A failing disk can show up anywhere. A bug in this program is not an OSError and keeps its traceback.
        if debug:
            raise
        if first_to_fail():
            _print(f"ketchup-cache: {' '.join(str(error).split())}")
        return 2


def _print(text: str, stream: TextIO | None = None) -> None:
    """Lines for people, without control characters, whoever wrote what is in them. stream: stderr if not given."""
    print("\n".join(map(printable, text.split("\n"))), file=stream or sys.stderr)


__all__ = ["Config", "Result", "app", "command", "main"]
