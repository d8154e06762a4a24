"""One thread per worker: more would only wait for each other on tiny models. No network. Places for caches."""

import os
import uuid

import pytest
from hypothesis import settings

from ketchup_cache import open_cache

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

os.fsync = lambda file: None
"""A killed process loses nothing that it wrote: only a power cut would, and those are stood in for (test_crash.py)."""

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture
def cache(tmp_path):
    """A new, empty one."""
    return open_cache(tmp_path / "cache", create=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny student and a tiny teacher."""
    from tests.helpers.models import save_model

    base = tmp_path_factory.mktemp("models")
    return save_model(base / "student", "1.0", seed=1), save_model(base / "teacher", "1.1", seed=2)


@pytest.fixture(scope="session", autouse=True)
def _memory_stores():
    """memory://NAME/PREFIX is an object store in this process."""
    from obstore.store import MemoryStore

    from ketchup_cache.sharing import stores

    made, real = {}, stores.open_client

    def client(address):
        return made.setdefault(address, MemoryStore()) if address.startswith("memory://") else real(address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "SCHEMES", (*stores.SCHEMES, "memory"))
        patch.setattr(stores, "open_client", client)
        yield


@pytest.fixture(scope="session")
def s3_endpoint():
    """Address of an emulated S3 on loopback."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'ketchup-cache[dev]'")
    from tests.helpers.stores import emulated_s3

    with emulated_s3() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """Name of a new, empty bucket; the environment leads to it."""
    from tests.helpers.stores import KEYS, make_bucket

    for key, value in {"AWS_ENDPOINT_URL": s3_endpoint, **KEYS}.items():
        monkeypatch.setenv(key, value)
    return make_bucket(s3_endpoint)


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """An address of a place that holds nothing yet."""
    if request.param == "local":
        return str(tmp_path / "remote")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/cache"
    return f"s3://{request.getfixturevalue('bucket')}/cache"
