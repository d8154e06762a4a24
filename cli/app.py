"""Turns a config class into a command: flags from its fields, help from their docstrings, errors in one line."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ketchup_cache.config.base import Config, Positive
from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.config.resolve import choices, flag, resolve
from ketchup_cache.errors import KetchupError
from ketchup_cache.shipped import recipe
from ketchup_cache.version import __version__

app = typer.Typer(
    name="ketchup-cache",
    help="Distil language models by K-step reinforcement learning, from a teacher's scores computed once.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# Newer releases of Typer carry a Click of their own; its errors have no public name there.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Result(Protocol):
    """What a command returns: a text for people and a dictionary for `--json`."""

    def to_dict(self) -> dict[str, Any]: ...
    def __str__(self) -> str: ...


def command(
    examples: Sequence[str], positional: Sequence[str] = ()
) -> Callable[[Callable[[Any], Result]], Callable[[Any], Result]]:
    """Put a function `name(config) -> Result` on the app as the command `name`."""

    def register(run: Callable[[Any], Result]) -> Callable[[Any], Result]:
        name = run.__name__
        fields = COMMANDS[name].model_fields

        def invoke(**flags: Any) -> None:
            config_file, recipe_name, as_json = (flags.pop(key) for key in ("config", "recipe", "as_json"))
            result = run(resolve(name, _config_path(config_file), flags, recipe_name))
            if as_json:
                print(json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False))
            else:
                print(result)
            if getattr(result, "ok", True) is False:
                raise typer.Exit(2)

        parameters = [_parameter(key, info, key in positional) for key, info in fields.items()]
        parameters += [_config_parameter(), _recipe_parameter(), _json_parameter()]
        # Click wants arguments before options; a stable sort keeps the order of the fields otherwise.
        parameters.sort(key=lambda p: p.name not in positional)
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {p.name: p.annotation for p in parameters}
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        app.command(name, help=inspect.getdoc(run), epilog=epilog)(invoke)
        return run

    return register


def _parameter(name: str, info: FieldInfo, positional: bool) -> inspect.Parameter:
    """Every flag is read as text and checked by the config class, so that all wrong values are reported at once."""
    text = info.description or ""
    if info.is_required():
        text += "  [required]"
    elif info.default not in (None, "", PydanticUndefined):
        shown = ",".join(map(str, info.default)) if isinstance(info.default, tuple) else str(info.default)
        text += f"  [default: {shown if not isinstance(info.default, bool) else shown.lower()}]"
    kind: Any = str | None
    declared: Any
    if positional:
        declared = typer.Argument(metavar=name.upper(), help=text, show_default=False)
    elif info.annotation is bool:
        both = f"{flag(name)}/--no-{name.replace('_', '-')}"
        kind, declared = bool | None, typer.Option(both, help=text, show_default=False)
    else:
        declared = typer.Option(flag(name), metavar=_metavar(info), help=text, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared])


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file with these options; flags win.",
        show_default=False,
    )
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _recipe_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--recipe",
        metavar="NAME",
        help="Published settings to start from (`ketchup-cache recipes`); --config and flags win.",
        show_default=False,
    )
    return inspect.Parameter(
        "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _json_parameter() -> inspect.Parameter:
    option = typer.Option("--json", help="Print the result as JSON.", show_default=False)
    return inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def _metavar(info: FieldInfo) -> str:
    if words := choices(info.annotation):
        number = Positive in typing.get_args(info.annotation)
        return "|".join(["INT"] * number + [*words])
    inner = [t for t in typing.get_args(info.annotation) if t is not type(None)] or [info.annotation]
    names = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
    return names.get(inner[0], "TEXT") if typing.get_origin(info.annotation) is not tuple else "INT,INT,…"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    # accepted before or after the command
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        return app(arguments, standalone_mode=False) or 0
    except KetchupError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"ketchup-cache: {line}", file=sys.stderr)
        return 2
    except _UsageError as error:
        print(f"ketchup-cache: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("ketchup-cache: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (OSError, MemoryError) as error:
        # A failing disk can show up anywhere. A bug in this program is not an OSError and keeps its traceback.
        if debug:
            raise
        print(f"ketchup-cache: {error}", file=sys.stderr)
        return 2


__all__ = ["Config", "Result", "app", "command", "main"]
