"""The rules of the tree: imports point one way, learning never meets the teacher, and what should be light is."""

import ast
import io
import re
import resource
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = "config method text parallel models cache sharing rollouts scoring evaluation training report".split()
"""Folders, each of which imports only from those before it, and from the root."""
BUDGET = {"ketchup_cache": 11_485, "tests": 14_788}
"""Lines of code at most (`code_lines`)."""


def modules() -> dict[str, Path]:
    """Module name without `ketchup_cache.` → file; the command line as `cli.*`."""
    found = {}
    for folder, prefix in (("ketchup_cache", ""), ("cli", "cli.")):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[prefix + name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules of ours that a file imports anywhere, for types too; `at_import`: only those loaded with it."""
    tree, found, later = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            later |= set(ast.walk(node)) if at_import else set()
    for node in set(ast.walk(tree)) - later:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("ketchup_cache.") for name in found if name.startswith("ketchup_cache.")} & set(modules())


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items()}
AT_IMPORT = {name: imports(path, at_import=True) for name, path in MODULES.items()}


def reachable(name: str, of: dict[str, set[str]] = IMPORTS) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        for other in of[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def room(name: str) -> str:
    """The folder of a module; the root's files have none."""
    return name.partition(".")[0] if "." in name else ""


def test_the_reader_of_this_test_sees_real_modules():
    assert {"method.returns", "cache.cache", "training.learn", "cli.app", "scoring.teacher"} <= set(MODULES)
    assert "training.batches" in IMPORTS["training.source"]
    assert {room(name) for name in MODULES} == {"", "cli", *ROOMS}


def test_each_room_imports_only_from_those_before_it():
    """Imports for types count, and those inside functions."""
    for name, found in IMPORTS.items():
        if name in ("__init__", "__main__") or room(name) == "cli":
            continue
        allowed = {"", *(ROOMS[: ROOMS.index(room(name)) + 1] if room(name) else ())}
        assert {room(other) for other in found} <= allowed, (name, sorted(found))


def test_there_are_no_import_cycles():
    for name in MODULES:
        assert name not in reachable(name), name


def test_the_root_has_at_most_nine_files():
    assert len(list((ROOT / "ketchup_cache").glob("*.py"))) <= 9


def code_lines(path: Path) -> int:
    """Lines of a file without blanks, comments and docstrings."""
    text, kept = path.read_text(), set()
    words = tokenize.generate_tokens(io.StringIO(text).readline)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for word in (word for word in words if word.type not in layout):
        kept |= set(range(word.start[0], word.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                kept -= set(range(node.lineno, node.end_lineno + 1))
    return len(kept)


@pytest.mark.parametrize("folder", BUDGET)
def test_lines_of_code_stay_within_the_budget(folder):
    """By room with `pytest -s -k budget`."""
    rooms: dict[str, int] = {}
    for path in (ROOT / folder).rglob("*.py"):
        name = path.relative_to(ROOT / folder).parts[0]
        rooms[name] = rooms.get(name, 0) + code_lines(path)
    print(f"\n{folder}: {sum(rooms.values()):,} lines of code, budget {BUDGET[folder]:,}")
    print(*(f"{lines:>7,} {name}" for name, lines in sorted(rooms.items(), key=lambda r: -r[1])), sep="\n")
    assert sum(rooms.values()) <= BUDGET[folder]


def test_lines_of_code_are_counted_as_they_are_read(tmp_path):
    (file := tmp_path / "a.py").write_text(
        '"""One.\n\nTwo."""\n# three\nx = """a\nb"""  # four\ndef f():\n    "Five."\n    return [\n        x]'
    )
    assert code_lines(file) == 5


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")]  # not those in .venv


@pytest.mark.parametrize("page", sorted(str(p.relative_to(ROOT)) for p in PAGES))
def test_pages_name_files_that_exist(page):
    """Paths in `code` and in links; the log of experiments names what was there then."""
    if page in ("docs/log.md", "CHANGELOG.md"):
        return
    text = (ROOT / page).read_text()
    folders = "ketchup_cache|cli|schemas|tests|benchmarks|data|docs|examples"
    named = set(re.findall(rf"\b((?:{folders})/[\w/.-]+\.\w+)", text))
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert not sorted(name for name in named if not (ROOT / name).exists())
    assert not sorted(link for link in links if not ((ROOT / page).parent / link).exists())


@pytest.mark.parametrize("name", ["returns", "baselines", "losses", "divergences"])
def test_maths_is_pure(name):
    """No I/O, no config, no model: arrays in, arrays out."""
    assert IMPORTS[f"method.{name}"] <= {"types"}


def test_learning_meets_the_teacher_only_where_it_has_one():
    """Offline learning never imports what scores."""
    for name in MODULES:
        if room(name) == "training":
            assert not any(room(other) == "scoring" for other in reachable(name, AT_IMPORT)), name


def test_files_hold_one_idea():
    """About 300 lines is where a file becomes two."""
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 420}
    assert not long


@pytest.mark.parametrize(
    "code",
    [
        "import ketchup_cache.cache.cache, ketchup_cache.cache.inspect",
        "import ketchup_cache.config.commands, ketchup_cache.types, ketchup_cache.errors",
        "import ketchup_cache.method.returns, ketchup_cache.report.analyze",
        "import ketchup_cache.cli",
        "from ketchup_cache import k_step_returns, open_cache",
    ],
)
def test_imports_without_torch(code):
    check = f"import sys; {code}; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    """In processor time, best of three: a busy machine is not a slow program."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ketchup_cache", "learn", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0


def test_an_installation_adds_one_top_level_module(tmp_path):
    """`cli`, `schemas` and `data` are folders of the repository, not modules of site-packages."""
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {p.split(".")[0] for p in packages} == {"ketchup_cache"}
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ketchup_cache").rglob("__init__.py")}
    assert on_disk <= set(packages)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 140]
