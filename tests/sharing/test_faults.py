"""Copies that are killed, cut off or made by many at once: nothing partial is ever seen.

KETCHUP_SOAK=1: more kills.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import pytest

from ketchup_cache.cache.cache import open_cache
from ketchup_cache.cache.garbage import collect
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cli import main
from ketchup_cache.errors import KetchupError
from ketchup_cache.sharing import base
from ketchup_cache.sharing import remote_cache as view
from ketchup_cache.sharing.stores import open_remote
from ketchup_cache.sharing.transfer import copy, merge
from tests.helpers.segments import exit_code, fill, in_child, make_prompts, make_rollouts, prompts_info, rollouts_info

KILLS = 50 if os.environ.get("KETCHUP_SOAK") else 3


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(view.HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Twenty segments, children among them."""
    made = open_cache(tmp_path_factory.mktemp("big") / "c", create=True)
    for seed in range(10):
        prompts = made.commit_prompts(make_prompts([300] * 20, seed=seed), prompts_info())
        made.commit_rollouts(make_rollouts([200] * 20, prompts=20, seed=seed), rollouts_info(prompts, 20))
    return made


def contents(root):
    found = (p for folder in ("manifests", "segments") for p in (root / folder).rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def start(code, *words):
    """A Python process that has made its imports and begins now."""
    code = "import sys\nfrom ketchup_cache.sharing import transfer\nprint('go', flush=True)\n" + code
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "go\n"
    return process


def killed(work, longest):
    """Kill it, a function or a process, after a random time; whether it had not ended by itself. `longest`: seconds."""
    pid = in_child(work) if callable(work) else work.pid
    time.sleep(np.random.default_rng().uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    return exit_code(pid) != 0


COPY = "transfer.copy(sys.argv[1], sys.argv[2])"


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_killed_pushes_and_pulls_show_nothing_partial_and_go_on(big, url, tmp_path):
    hit = 0
    for _ in range(KILLS):
        # a child that was forked can't use the threads of the S3 client
        hit += killed(start(COPY, big.path, url), 1.0) if "://" in url else killed(lambda: copy(big.path, url), 0.4)
        if open_remote(url).exists():
            assert verify(view.open_cache(url), deep=False).ok
    copy(big.path, url)
    assert verify(view.open_cache(url), deep=False).segments == 20
    for _ in range(KILLS):
        back = tmp_path / "back"
        hit += killed(start(COPY, url, back), 0.6) if "://" in url else killed(lambda: copy(url, back), 0.4)  # noqa: B023
        if (tmp_path / "back" / "ketchup-cache.json").exists():
            assert verify(open_cache(tmp_path / "back")).ok
    report = copy(url, tmp_path / "back")
    assert report.already + sum(report.segments.values()) == 20
    assert contents(big.path).items() <= contents(tmp_path / "back").items()
    assert hit


def test_killed_merges_and_gcs_lose_nothing(big, tmp_path):
    other = open_cache(tmp_path / "other", create=True)
    fill(other)
    ours = open_cache(tmp_path / "ours", create=True)
    kept = set(fill(ours))
    hit = 0
    for _ in range(KILLS):
        hit += killed(lambda: merge([big.path, other.path], ours.path), 0.4)
        assert verify(open_cache(ours.path)).ok
        for name in range(40):  # garbage for gc to be killed at
            shutil.copytree(next((other.path / "segments").iterdir()), ours.path / "segments" / f"{name:064x}")
        hit += killed(lambda: collect(ours, hours=0), 0.1)
        report = verify(open_cache(ours.path))
        assert report.ok
        assert kept <= set(ours.segment_ids())
        assert main(["verify", str(ours.path), "--clean", "--older-than", "0"]) == 0
        assert verify(open_cache(ours.path)).orphans == 0
    assert main(["merge", str(big.path), str(other.path), "--into", str(ours.path)]) == 0
    assert set(ours.segment_ids()) == kept | set(big.segment_ids()) | set(other.segment_ids())
    assert verify(open_cache(ours.path)).ok
    assert hit


def test_processes_that_copy_the_same_segments_to_one_folder_all_succeed(big, tmp_path):
    processes = [start(COPY, big.path, tmp_path / "b") for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert contents(tmp_path / "b") == contents(big.path)
    assert not list((tmp_path / "b" / "tmp").iterdir())


READ = """
from ketchup_cache.sharing import remote_cache as view
cache = view.open_cache(sys.argv[1])
for _ in range(2):
    for id_, _ in cache.manifests("prompts"):
        cache._decoded.clear()
        cache.load_prompts(id_)
"""


def test_processes_share_a_segment_cache_that_is_too_small(big, bucket, tmp_path, monkeypatch):
    """Each drops what the others have fetched, and all read what is right."""
    copy(big.path, f"s3://{bucket}/cache")
    monkeypatch.setenv(view.SIZE_VARIABLE, "30KB")
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
    sent, put = [], base.Packed

    def lost_after_ten(id_, manifest, files):
        sent.append(id_)
        relay.down = relay.down or len(sent) > 10
        return put(id_, manifest, files)

    monkeypatch.setattr(base, "Packed", lost_after_ten)
    monkeypatch.setattr("ketchup_cache.sharing.object_store.RETRIES", {"max_retries": 0})
    assert main(["push", str(big.path), url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be reached" in line
    assert "run the command again" in line
    assert "SECRET" not in line
    with pytest.raises(KetchupError, match="can't be reached"):
        copy(url, tmp_path / "b")
    relay.down = False
    monkeypatch.setattr(base, "Packed", put)
    there = len(open_remote(url).segment_ids())
    assert there == 10
    report = copy(big.path, url)
    assert (report.already, sum(report.segments.values())) == (10, 10)
    copy(url, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(big.path)
