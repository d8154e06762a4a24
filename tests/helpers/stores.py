"""Stores for tests: in memory, and an emulated S3 (moto's server on loopback) kills, writers of the same keys."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index_file import HOME_VARIABLE
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.segment_bytes import parse_manifest, read_manifest, read_segment
from ketchup_cache.sharing.stores import ObjectStore, open_store
from ketchup_cache.sharing.transfer import copy
from tests.helpers.segments import add_prompts, contents, fill
from tests.helpers.trust import Count, kill_at_random, kills

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "SECRET"}


@contextmanager
def emulated_s3() -> Iterator[str]:
    """Address of an emulated S3. Raises ImportError where moto is not installed."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def make_bucket(endpoint: str) -> str:
    name = uuid.uuid4().hex
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return name


def families(root: Path, count: int = 10) -> Cache:
    """Prompts with rollouts, so that there are children whose parents must come first."""
    for seed in range(count):
        fill(root, sizes=([300] * 20, [200] * 20, ()), seed=seed, forced=False)
    return open_cache(root)


COPY = """
import sys
from ketchup_cache.sharing import transfer
from ketchup_cache.sharing.stores import open_store
open_store(sys.argv[1]), open_store(sys.argv[2])
print("go", flush=True)
transfer.copy(sys.argv[1], sys.argv[2])
"""


def start(code: str, *words: str) -> subprocess.Popen[str]:
    """A process that has said "go", its imports made. (A forked child can't use the threads of the S3 client.)"""
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "go\n"
    return process


def start_and_kill(places: tuple[str, str], after_s: float) -> tuple[set[str], bool]:
    """What the target of a copy holds then, and whether the kill came before the end."""
    process = start(COPY, *places)
    time.sleep(after_s)
    process.kill()
    killed, target = process.wait() == -signal.SIGKILL, open_store(places[1])
    return set(target.segment_ids()) if target.exists() else set(), killed


def kill_copies(folder: Path, times: int, *, pull: bool, seed: int = 0) -> Count:
    """Kill a push to S3, or a pull from it, at random moments; each goes on where the last one was killed.

    acknowledged: segments that were seen in the target; each must be there, and whole, ever after.
    """
    source, rng, count, whole_s = families(folder / "source"), random.Random(seed), kills(), 0.0
    os.environ[HOME_VARIABLE] = str(folder / "home")
    with emulated_s3() as endpoint:
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, **KEYS}
        while count.kills < times:
            given, taken = str(source.path), f"s3://{make_bucket(endpoint)}/cache"
            if pull:
                copy(given, taken)
                given, taken = taken, str(folder / f"pulled {count.kills}")
            if not whole_s:
                process, began = start(COPY, given, f"{taken} measured"), time.monotonic()
                assert process.wait() == 0
                whole_s = time.monotonic() - began
            some = min(times - count.kills, rng.randint(1, 6))
            kill_at_random((given, taken), taken, count, some, 0.9 * whole_s, rng.randrange(10**9), start_and_kill)
            copy(given, taken)
            assert set(open_store(taken).segment_ids()) == set(source.segment_ids())
            assert verify(open_cache(taken)).ok
    return count


class Watched(ObjectStore):
    """Tells who created what, and looks that no manifest is there before its data."""

    def __init__(self, url: str, created: list[str], early: list[str]) -> None:
        super().__init__(url)
        self.created, self.early = created, early

    def _create(self, key: str, data: bytes) -> bool:
        if key.startswith("manifests/"):
            segment = key[10:74]
            for name in parse_manifest(data, segment, key).files:
                try:
                    self._get(f"segments/{segment}/{name}", 10**6)
                except FileNotFoundError:
                    self.early.append(key)
        made = super()._create(key, data)
        if made:
            self.created.append(key)  # of all writers; appending is atomic
        return made


def same_keys(folder: Path, url: str, writers: int, segments: int) -> Count:
    """Writers that all bring the same segments to the same place at once, through clients of their own.

    lost: objects that nobody created. early: manifests that were there before their data.
    """
    cache = open_cache(folder / "many", create=True)
    for seed in range(segments):
        add_prompts(cache, seed=seed)
    created: list[str] = []
    early: list[str] = []

    def push(_: int) -> None:
        remote, local = Watched(url, created, early), open_store(cache.path)
        remote.create()
        for id_ in cache.segment_ids():
            remote.put([read_segment(local, id_, *read_manifest(local, id_))])

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(push, range(writers)))
    wanted = contents(cache.path).keys() | {"ketchup-cache.json"}
    twice, lost = len(created) - len(set(created)), len(wanted - set(created))
    made = {"segments": segments, "objects": len(wanted)}
    return Count(**made, two_creators=twice, lost=lost, early=len(early))
