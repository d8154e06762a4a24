"""One thread per worker, so that two workers on two cores do not fight; no network; places for caches elsewhere."""

import logging
import os
import urllib.request
import uuid

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def s3_endpoint():
    """Address of an emulated S3 on loopback."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'ketchup-cache[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(s3_endpoint, monkeypatch):
    """Name of a new, empty bucket; the environment leads to it."""
    name = uuid.uuid4().hex
    keys = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "SECRET"}
    for key, value in keys.items():
        monkeypatch.setenv(key, value)
    urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")).close()
    return name


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """An address of a place that holds nothing yet."""
    if request.param == "local":
        return str(tmp_path / "remote")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/cache"
    return f"s3://{request.getfixturevalue('bucket')}/cache"
