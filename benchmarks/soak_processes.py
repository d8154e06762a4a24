"""Kills of `benchmarks/soak.py` among several processes: a random one of those that torchrun started, and a random
worker on a Ray cluster of two nodes."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.config.commands import RolloutConfig, ScoreConfig
from ketchup_cache.console import on_progress
from ketchup_cache.rollouts import rollout as module
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from tests.helpers.caches import rows_of
from tests.helpers.models import write_prompts
from tests.helpers.trust import Count, ray_workers

ROOT = Path(__file__).parents[1]
LAUNCHER = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m ketchup_cache".split()]
ALL_END_S = 60.0
"""After a kill."""


def counted() -> Count:
    """rows: those that should be there and scored; lost: those that are not. twice: accepted twice. different: ends
    that are not that of a run that nobody killed. slow: kills after which the others took more than `ALL_END_S`."""
    return Count(kills=0, rows=0, lost=0, twice=0, different=0, slow=0)


def check(count: Count, root: Path) -> None:
    """Of a cache whose rollouts were all to be scored."""
    cache = open_cache(root)
    assert verify(cache).ok
    there = {(id_, row) for id_, _ in cache.rollouts() for row in range(cache.manifest(id_).rows)}
    scored = [(ref.rollouts_id, row) for ref in cache.scored() for row in range(ref.row_start, ref.row_stop)]
    count.rows += len(there)
    count.lost += len(there - set(scored))
    count.twice += len(scored) - len(set(scored))


def values(root: Path) -> list[np.ndarray]:
    """All numbers of the scored rows, in an order that does not depend on who came first."""
    rows = sorted(open_cache(root).rows(), key=lambda row: (row.prompt_id, *row.completion_tokens))
    return [np.stack([row.q, row.max_q]) for row in rows]


def same_values(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and np.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True)
    )


def launch(words: list[str], watched: Callable[[], set[str]], moment: int | None, rng: random.Random) -> Any:
    """How often something new was seen, and the seconds that the others took to end after one of the two was killed
    (None: it ended by itself). moment: of how many such changes the kill comes shortly after."""
    seen, changes, killed_at = watched(), 0, 0.0
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([*LAUNCHER, *words], cwd=ROOT, stdout=log, stderr=log)
        while started.poll() is None:
            changes, seen = changes + bool(watched() - seen), seen | watched()
            if moment is not None and changes >= moment and not killed_at:
                time.sleep(rng.uniform(0, 0.5))
                with suppress(psutil.Error, IndexError):
                    rng.choice(psutil.Process(started.pid).children(recursive=True)).kill()
                    killed_at = time.monotonic()
            time.sleep(0.01)
        log.seek(0)
        assert killed_at or not started.returncode, log.read().decode()
    return changes, time.monotonic() - killed_at if killed_at and started.returncode else None


def kill_ranks(
    words: list[str], watched: Callable[[], set[str]], root: Path, reset: Callable[[], object],
    result: Callable[[], Any], times: int, seed: int,
) -> Count:  # fmt: skip
    """Kill one of two processes at a random moment of their work, some times in a row; each run goes on where the last
    one was.

    watched: names of what the command has written. reset: sets the scene. result: of a run that has ended; compared
    with that of one that nobody killed.
    """
    count, rng = counted(), random.Random(seed)
    reset()
    all_changes, _ = launch(words, watched, None, rng)
    wanted = result()
    while count.kills < times:
        reset()
        left = all_changes
        for _ in range(rng.randint(1, min(3, times - count.kills))):
            if left > 1:
                changes, took = launch(words, watched, rng.randrange(1, left), rng)
                left -= changes
                count.kills += took is not None
                count.slow += took is not None and took > ALL_END_S
        launch(words, watched, None, rng)
        check(count, root)
        found = result()
        count.different += not (same_values(found, wanted) if isinstance(wanted, list) else found == wanted)
    return count


def two_nodes() -> Any:
    """A cluster on this machine. Where it is busy, a node may not be up in the 30 seconds that Ray waits."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
    for tries_left in reversed(range(5)):
        cluster = Cluster()
        try:
            for _ in range(2):  # the first is the head
                cluster.add_node(**size)
            return cluster
        except Exception:
            cluster.shutdown()
            if not tries_left:
                raise
    return None


def kill_workers(folder: Path, models: tuple[Path, Path], times: int, seed: int) -> Count:
    """`rollout` and `score --engine ray`, in which workers are killed at random moments. Ray starts others."""
    count, rng = counted(), random.Random(seed)
    given: Any = {"data": str(write_prompts(folder / "prompts.jsonl", 120, seed=seed)), "max_new_tokens": 9}
    given |= {"student": str(models[0]), "samples": 2, "rollout_batch": 5, "device": "cpu", "seed": seed % 1000}
    scoring: Any = {"teacher": str(models[1]), "commit_tokens": 60, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROLLOUTS_AT_ONCE", 8)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        rollout(RolloutConfig(cache=folder / "whole", **given))
        score(ScoreConfig(cache=folder / "whole", **scoring))
        wanted = rows_of(open_cache(folder / "whole")), values(folder / "whole")
        cluster = two_nodes()
        ray: Any = {"engine": "ray", "ray_address": cluster.address}
        killer = threading.Timer(0, int)

        def kill() -> None:
            if count.kills < times and (there := ray_workers()):
                with suppress(psutil.NoSuchProcess):
                    rng.choice(there).kill()
                    count.kills += 1

        def sometimes(*_: object) -> None:
            nonlocal killer
            if not killer.is_alive() and rng.random() < 0.3:
                (killer := threading.Timer(rng.uniform(0, 0.5), kill)).start()

        number = 0
        while count.kills < times:
            root, number = folder / f"ray {number}", number + 1
            with on_progress(sometimes):
                rollout(RolloutConfig(cache=root, **given, **ray))
                score(ScoreConfig(cache=root, **scoring, **ray))
            killer.join(1) if killer.is_alive() else None
            check(count, root)
            found = rows_of(open_cache(root)), values(root)
            count.different += not (found[0] == wanted[0] and same_values(found[1], wanted[1]))
        cluster.shutdown()
    return count
