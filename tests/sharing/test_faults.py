"""Copies that are killed, cut off or made by many at once: nothing partial is ever seen."""

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import pytest

from benchmarks.soak import kill_copy
from ketchup_cache.cache import segment_bytes
from ketchup_cache.errors import KetchupError
from ketchup_cache.sharing import remote_cache
from ketchup_cache.sharing.stores import open_store
from ketchup_cache.sharing.transfer import copy
from tests.helpers.errors import fails, refuses
from tests.helpers.segments import contents
from tests.helpers.stores import families, start


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Twenty segments, children among them."""
    return families(tmp_path_factory.mktemp("big") / "c")


@pytest.mark.parametrize("command", ["push", "merge"])
def test_killed_copies_show_nothing_partial_and_go_on(command, tmp_path):
    """From folder to folder. Those to and from S3: `tests/cache/test_trust.py`."""
    count = kill_copy(tmp_path, 3, command)
    assert (count.kills, count.lost, count.partial) == (3, 0, 0)


READ = """
import sys
from ketchup_cache import open_cache
print("go", flush=True)
cache = open_cache(sys.argv[1])
for _ in range(2):
    for id_, _ in cache.manifests("prompts"):
        cache._decoded.clear()
        cache.load_prompts(id_)
"""


def test_processes_share_a_segment_cache_that_is_too_small(big, bucket, tmp_path, monkeypatch):
    """Each drops what the others have fetched, and all read what is right."""
    copy(big.path, f"s3://{bucket}/cache")
    monkeypatch.setenv(remote_cache.SIZE_VARIABLE, "30KB")
    processes = [start(READ, f"s3://{bucket}/cache") for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    held = sum(p.stat().st_size for p in (tmp_path / "home" / "segments").rglob("*") if p.is_file())
    assert 0 < held < 80_000
    assert not list((tmp_path / "home" / "tmp").iterdir())


class Flaky:
    """A relay to a server that drops each connection after some bytes, and all of them while it is down."""

    def __init__(self, endpoint, limits):
        parts = urlsplit(endpoint)
        self.target, self.limits, self.down, self.cuts = (parts.hostname, parts.port), iter(limits), False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.down:
                client.close()
                continue
            server = socket.create_connection(self.target)
            budget = [next(self.limits, 10**9)]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(one, other, budget), daemon=True).start()

    def _relay(self, source, target, budget):
        with suppress(OSError):
            while data := source.recv(4096):
                budget[0] -= len(data)
                if budget[0] < 0 or self.down:
                    self.cuts += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def flaky(bucket, s3_endpoint, monkeypatch):
    rng = np.random.default_rng(3)
    relay = Flaky(s3_endpoint, [int(rng.integers(200, 4000)) if i % 3 == 0 else 10**9 for i in range(600)])
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    yield f"s3://{bucket}/cache", relay
    relay.listener.close()


def test_connections_that_are_cut_are_made_again(big, flaky, tmp_path):
    url, relay = flaky
    copy(big.path, url)
    copy(url, tmp_path / "b")
    assert relay.cuts >= 10
    assert contents(tmp_path / "b") == contents(big.path)


def test_a_lost_connection_is_one_line_and_the_next_push_goes_on(big, flaky, tmp_path, capsys, monkeypatch):
    url, relay = flaky
    relay.limits = iter(())
    sent, packed = [], segment_bytes.Packed

    def lost_after_ten(id_, manifest, files):
        sent.append(id_)
        relay.down = relay.down or len(sent) > 10
        return packed(id_, manifest, files)

    monkeypatch.setattr(segment_bytes, "Packed", lost_after_ten)
    monkeypatch.setattr("ketchup_cache.sharing.stores.RETRIES", {"max_retries": 0})
    line = fails(capsys, "push", big.path, url)
    assert "can't be reached" in line
    assert "run the command again" in line
    assert "SECRET" not in line
    refuses(KetchupError, "can't be reached", copy, url, tmp_path / "b")
    relay.down = False
    monkeypatch.setattr(segment_bytes, "Packed", packed)
    assert len(open_store(url).segment_ids()) == 10
    report = copy(big.path, url)
    assert (report.already, sum(report.segments.values())) == (10, 10)
    copy(url, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(big.path)
