"""What the tests of sharing share: short pauses, a segment cache of their own, a cache with three segments."""

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.index_file import HOME_VARIABLE
from ketchup_cache.sharing import stores
from tests.helpers.segments import fill


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path):
    fill(tmp_path / "a")
    return open_cache(tmp_path / "a")
