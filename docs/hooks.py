"""Pages of the site that are made of the code: the start from README.md, the reference from options and docstrings, and
what the pages link to elsewhere in the repository, under repo/.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import cli
from cli.app import COMMAND_PANELS, EXAMPLES, panels_of
from ketchup_cache import _HOME
from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.config.resolve import flag

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def source_of(page: str) -> str:
    """Path in the repository of a page of the site."""
    if page == "index.md":
        return "README.md"
    return page.removeprefix("repo/") if page.startswith("repo/") else f"docs/{page}"


def page_of(source: str) -> str:
    """And back."""
    if source == "README.md":
        return "index.md"
    return source.removeprefix("docs/") if source.startswith("docs/") else f"repo/{source}"


def linked(page: str, text: str) -> list[str]:
    """Files of the repository that a page links to, as paths in it."""
    folder = posixpath.dirname(source_of(page))
    found = [posixpath.normpath(posixpath.join(folder, link)) for link, _ in LINK.findall(text)]
    return [path for path in found if (ROOT / path).is_file()]


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    made = {"reference/commands.md": commands(), "reference/python.md": python(), "reference/records.md": records()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "schemas/cache-format.md"):
        files.append(File.generated(config, f"repo/{name}", abs_src_path=str(ROOT / name)))
    waiting = [file for file in files if file.src_uri.endswith(".md") and not file.src_uri.startswith("reference/")]
    while waiting:
        page = waiting.pop()
        for path in linked(page.src_uri, page.content_string):
            if files.get_file_from_path(page_of(path)) is None:
                file = File.generated(config, page_of(path), abs_src_path=str(ROOT / path))
                files.append(file)
                waiting += [file] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository → links of the site."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(source_of(uri))

    def replaced(match: re.Match[str]) -> str:
        target = page_of(posixpath.normpath(posixpath.join(folder, match[1])))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match[2] or ''})"

    return LINK.sub(replaced, markdown)


def commands() -> str:
    """Every command with its options, as `--help` has them."""
    assert cli.main  # importing it puts all commands on the app
    parts = ["# Commands\n", "Options can also stand in a YAML file (`--config`); every command has `--json`.\n"]
    for name in COMMAND_PANELS:
        parts += [f"## {name}\n", "```sh", *EXAMPLES[name], "```\n", "| option | default | |", "| --- | --- | --- |"]
        title = ""
        for key, panel in panels_of(name).items():
            field = COMMANDS[name].model_fields[key]
            if panel != title:
                parts.append(f"| **{panel}** | | |")
                title = panel
            known = field.default is not None and field.default != "" and field.default != ()
            default = (
                "required" if field.is_required() else f"`{json.dumps(field.default, default=str)}`" if known else ""
            )
            text = " ".join((field.description or "").split()).replace("|", "\\|").replace("<", "&lt;")
            parts.append(f"| `{flag(key)}` | {default} | {text} |")
        parts.append("")
    return "\n".join(parts)


def python() -> str:
    """Every public name, by mkdocstrings."""
    names = [f"::: ketchup_cache.{home}.{name}\n" for name, home in _HOME.items() if not name.endswith("Config")]
    return "# Python\n\nThe options of each command are its `Config`: see [Commands](commands.md).\n\n" + "\n".join(
        names
    )


def records() -> str:
    """The lines of the records of a run, from their schemas."""
    parts = ["# Records of a run\n"]
    for name in ("metrics", "dev"):
        schema = json.loads((ROOT / f"schemas/{name}.schema.json").read_text(encoding="utf-8"))
        parts += [f"## {name}.jsonl\n", "| key | meaning |", "| --- | --- |"]
        for key, value in schema["properties"].items():
            text = " ".join(value.get("description", "").split()).replace("|", "\\|")
            parts.append(f"| `{key}` | {text} |")
        parts.append("")
    return "\n".join(parts)
