"""The short form of `make soak`: the same code, fewer cases."""

import os
import resource
from pathlib import Path

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.index_file import HOME_VARIABLE
from ketchup_cache.errors import WriteError
from tests.helpers.errors import refuses
from tests.helpers.hostile import HOSTILE
from tests.helpers.segments import add_prompts, exit_code, in_child
from tests.helpers.stores import KEYS, kill_copies
from tests.helpers.trust import ERRORS, fail_every_step, flips, kill_clean, kill_writers, write_at_once


def test_killed_writers(tmp_path: Path) -> None:
    count = kill_writers(tmp_path, 25)
    assert (count.kills, count.lost, count.partial) == (25, 0, 0)
    assert count.acknowledged >= 25  # 0 to 3 commits before each kill


def test_killed_clean(tmp_path: Path) -> None:
    count = kill_clean(tmp_path / "c", 5)
    assert (count.kills, count.lost, count.partial) == (5, 0, 0)


@pytest.mark.parametrize("pull", [False, True])
def test_killed_copies_to_and_from_s3(tmp_path: Path, monkeypatch, pull: bool) -> None:
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'ketchup-cache[dev]'")
    for name in (HOME_VARIABLE, "AWS_ENDPOINT_URL", *KEYS):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    count = kill_copies(tmp_path, 2, pull=pull)
    assert (count.kills, count.lost, count.partial) == (2, 0, 0)


def test_failing_writes(tmp_path: Path, monkeypatch) -> None:
    count = fail_every_step(tmp_path, monkeypatch, every=2)
    assert count.failures > 10 * len(ERRORS)
    assert (count.false_acknowledgements, count.unclear) == (0, 0)


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """No stand-in for `os`: the kernel refuses to let a file grow."""
    cache = open_cache(tmp_path / "c", create=True)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        refuses(WriteError, r"can't write .File too large", add_prompts, cache, (20_000,))

    assert exit_code(in_child(work)) == 0
    assert open_cache(cache.path).manifests() == []
    assert os.listdir(cache.path / "tmp") == []


def test_flipped_bits_and_bytes(tmp_path: Path) -> None:
    count = flips(tmp_path, 400)
    assert (count.cases, count.refused, count.silent) == (400, 400, 0)


def test_eight_writers_and_a_reader(tmp_path: Path) -> None:
    count = write_at_once(tmp_path, 8, 10)
    assert (count.segments, count.lost, count.torn) == (80, 0, 0)
    assert count.looks >= 1  # how often depends on the machine


def test_there_are_at_least_forty_hostile_segments() -> None:
    """Beside hostile scores, parents and markers, which have tests of their own. Each runs for both format versions."""
    assert len(HOSTILE) >= 40
