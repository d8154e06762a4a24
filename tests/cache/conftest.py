"""What the tests of the cache share."""

import pytest

from ketchup_cache import open_cache


@pytest.fixture
def cache(tmp_path):
    """A new, empty one."""
    return open_cache(tmp_path / "cache", create=True)
