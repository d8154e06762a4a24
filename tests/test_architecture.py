"""The rules of the tree: imports point one way, learning never meets the teacher, and what should be light is."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVERS = {"pretrain", "rollout", "score", "learn.loop", "evaluate", "analyze", "compact", "demo", "judge.driver"}
DRIVERS |= {"export", "watch"}
FOUNDATION = {"types", "errors", "config", "config_base", "config_caches", "config_groups", "config_watch"}


def modules() -> dict[str, Path]:
    """Module name without `ketchup_cache.` → file; the command line as `cli.*`."""
    found = {}
    for folder, prefix in (("ketchup_cache", ""), ("cli", "cli.")):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[prefix + name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, for types only left out."""
    tree, found = ast.parse(path.read_text()), set()
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("ketchup_cache.") for name in found if name.startswith("ketchup_cache.")} & set(modules())


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def reachable(name: str) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        for other in IMPORTS[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def test_the_reader_of_this_test_sees_real_modules():
    assert {"returns", "store.cache", "learn.loop", "cli.app", "teacher"} <= set(MODULES)
    assert "learn.stream" in IMPORTS["learn.source"]


def test_drivers_do_not_import_each_other_and_nobody_else_imports_them():
    for name, found in IMPORTS.items():
        if not name.startswith("cli"):
            assert not found & (DRIVERS - {name}), f"{name} imports {found & DRIVERS}"


def test_nothing_below_imports_the_command_line():
    for name, found in IMPORTS.items():
        if not name.startswith("cli") and name != "__main__":
            assert not any(f.startswith("cli") for f in found), name


def test_foundation_imports_nothing_above_it():
    for name in FOUNDATION:
        assert IMPORTS[name] <= FOUNDATION, name


@pytest.mark.parametrize("name", ["returns", "baselines", "losses", "suggest"])
def test_maths_is_pure(name):
    """No I/O, no config, no model: arrays in, arrays out."""
    assert IMPORTS[name] <= {"types"}


def test_learning_never_reaches_the_teacher():
    for name in MODULES:
        if name.startswith(("learn", "training")):
            assert not {"teacher", "score"} & reachable(name), name


def test_there_are_no_import_cycles():
    for name in MODULES:
        assert name not in reachable(name) or name.endswith("__init__"), name


def test_files_hold_one_idea():
    """About 300 lines is where a file becomes two."""
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 420}
    assert not long


@pytest.mark.parametrize(
    "code",
    [
        "import ketchup_cache.cache.cache, ketchup_cache.cache.inspect",
        "import ketchup_cache.config.commands, ketchup_cache.types, ketchup_cache.errors",
        "import ketchup_cache.method.returns, ketchup_cache.report.analyze, ketchup_cache.report.judge.driver",
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
    on_disk = {
        f"ketchup_cache.{p.parent.relative_to(ROOT / 'ketchup_cache')}".replace("/", ".").removesuffix("..")
        for p in (ROOT / "ketchup_cache").rglob("__init__.py")
    } - {"ketchup_cache.."}
    assert {p.rstrip(".") for p in on_disk} | {"ketchup_cache"} <= set(packages)
