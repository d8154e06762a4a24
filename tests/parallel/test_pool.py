"""`--engine ray`, on a cluster of two nodes on this machine: workers and nodes come and go, and nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.config.commands import RolloutConfig, ScoreConfig
from ketchup_cache.console import on_progress
from ketchup_cache.errors import ConfigError, ModelError, ProcessError
from ketchup_cache.parallel import pool
from ketchup_cache.parallel.pool import on_ray
from ketchup_cache.rollouts import rollout as module
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring import score as scoring
from ketchup_cache.scoring.score import Scorer, score
from tests.helpers.caches import rows_of
from tests.helpers.errors import fails, refuses
from tests.helpers.models import write_prompts
from tests.helpers.trust import ray_workers

SIZE = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}
SECRET = "a-key-that-is-in-no-file"


@pytest.fixture(scope="module")
def cluster():
    """Of one node."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ketchup-cache[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("OMP_NUM_THREADS", "7")  # a worker has its own
        made = or_skipped(lambda: Cluster(initialize_head=True, head_node_args=SIZE))
        yield made
    made.shutdown()


def or_skipped(start):
    """A node, or a cluster, that starts."""
    try:
        return start()
    except Exception as error:  # of many kinds; Ray gives a node half a minute
        pytest.skip(f"no Ray node starts here: {error}")


def options_of(cluster, **more) -> ScoreConfig:
    how = {"engine": "ray", "ray_address": cluster.address, "device": "cpu"}
    return ScoreConfig(teacher="teacher", cache="cache", **how | more)


def test_a_machine_that_comes_helps_and_a_dead_workers_part_is_done_by_another(cluster, tmp_path, monkeypatch, capsys):
    """The first worker waits for what others must do: the second node, and the third worker where the second died."""
    monkeypatch.setenv("KETCHUP_CACHE_API_KEY", SECRET)

    def make():
        def work(part):
            (name,) = part
            while name == "wait" and not (tmp_path / "free").exists():
                time.sleep(0.02)
            if name == "die" and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            (tmp_path / name).touch()
            return os.getppid(), os.getcwd(), os.environ["OMP_NUM_THREADS"], os.environ["KETCHUP_CACHE_API_KEY"]

        return work

    found = {}
    for (name,), (node, *there) in on_ray(options_of(cluster), make, [("first",), ("wait",), ("die",), ("free",)]):
        assert name not in found
        found[name] = node
        assert there == [os.getcwd(), "1", SECRET]
        if name == "first":
            or_skipped(lambda: cluster.add_node(**SIZE))
    assert found.keys() == {"first", "die", "free", "wait"}  # the last two may end at once
    assert found["first"] == found["wait"] != found["die"] == found["free"]
    shown = capsys.readouterr()
    assert "a worker has ended, another does its part" in shown.err
    assert "worker died" not in shown.out  # Ray's own words would stand in the midst of --json
    files = [file for file in Path(cluster.head_node.get_session_dir_path()).rglob("*") if file.is_file()]
    assert len(files) > 9
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_what_a_worker_raises_is_one_line_with_its_machine(cluster, monkeypatch):
    def broken():
        raise ModelError("teacher: has no weights; copy it")

    def picky():
        def work(part):
            raise ConfigError(["one", f"{part} two"]) if part == ("lines",) else os.kill(os.getpid(), signal.SIGKILL)

        return work

    options = options_of(cluster, ray_workers=1)
    refuses(ModelError, r"no weights; copy it \(on [\d.]+\)$", lambda: list(on_ray(options, broken, [("a",)])))
    with pytest.raises(ConfigError) as caught:
        list(on_ray(options, picky, [("lines",)]))
    assert caught.value.problems[0] == "one"
    monkeypatch.setattr(pool, "MOST_DEATHS", 2)
    refuses(ProcessError, "again and again of the same part", lambda: list(on_ray(options, picky, [("deadly",)])))


@pytest.fixture
def whole(tmp_path, folders, monkeypatch):
    """Options of `rollout` for ten lots, and of `score` for twenty parts; both done by this process."""
    monkeypatch.setattr(module, "ROLLOUTS_AT_ONCE", 12)
    data, both = str(write_prompts(tmp_path / "prompts.jsonl", 60)), {"cache": tmp_path / "whole", "device": "cpu"}
    given = {"data": data, "samples": 2, "max_new_tokens": 9, "rollout_batch": 5, **both}
    sampling, rating = (
        RolloutConfig(student=str(folders[0]), **given),
        ScoreConfig(teacher=str(folders[1]), commit_tokens=60, **both),
    )
    return sampling, rating, rollout(sampling), score(rating)


@pytest.mark.timeout(900)
def test_rollouts_and_scores_are_those_of_one_process_whatever_ends(cluster, whole, tmp_path):
    """A worker is killed while they sample, and a node goes while they score."""
    sampling, rating, sampled, rated = whole
    node = max(cluster.worker_nodes, default=None, key=id) or or_skipped(lambda: cluster.add_node(**SIZE))
    other = {"cache": tmp_path / "cache", "engine": "ray", "ray_address": cluster.address}

    def in_the_middle(work, config, trouble):
        left, seen = [trouble], []
        with on_progress(lambda label, done, total: (seen.append((done, total)), left and left.pop()())):
            report = work(type(config)(**config.model_dump(exclude_unset=True) | other))
        assert seen[0][0] < seen[-1][0] == seen[-1][1]
        return report

    report = in_the_middle(rollout, sampling, lambda: ray_workers()[0].kill())
    assert (report.rollouts, report.tokens, report.already_there) == (sampled.rollouts, sampled.tokens, 0)
    report = in_the_middle(score, rating, lambda: cluster.remove_node(node))
    assert (report.already + report.computed + report.copied, report.tokens) == (120, rated.tokens)
    caches = [open_cache(tmp_path / name) for name in ("whole", "cache")]
    assert rows_of(caches[0]) == rows_of(caches[1])
    mine, theirs = (sorted(cache.rows(), key=lambda row: (row.prompt_id, *row.completion_tokens)) for cache in caches)
    for row, same in zip(mine, theirs, strict=True):
        np.testing.assert_allclose([same.q, same.max_q], [row.q, row.max_q], atol=1e-5)


def test_a_worker_does_nothing_again_and_has_the_commands_model(whole):
    """As where a worker died between its commit and its word of it."""
    sampling, rating, *_ = whole
    cache, teacher = open_cache(sampling.cache), Scorer(rating).info
    before, ((id_, info),) = cache.segment_ids(), cache.rollouts()
    lot = (info.prompts, 12, 24)
    assert module._worker(sampling, info.policy, info.tokenizer)(lot) == [(id_, *lot[1:])]
    report = scoring._worker(rating, teacher)((id_, range(2, 7)))
    assert (report.already, report.computed, report.copied, report.segments) == (5, 0, 0, 0)
    assert open_cache(sampling.cache).segment_ids() == before
    policy, teacher = (one.model_copy(update={"fingerprint": 64 * "0"}) for one in (info.policy, teacher))
    refuses(ModelError, "another model", module._worker, sampling, policy, info.tokenizer)
    refuses(ModelError, "another model", scoring._worker, rating, teacher)


def test_options_that_do_not_fit_are_one_line(capsys, monkeypatch):
    given = ["score", "--teacher", "t", "--cache", "c"]
    assert "give --engine ray too" in fails(capsys, *given, "--ray-workers", "2")
    with monkeypatch.context() as patch:
        patch.setattr("ketchup_cache.config.options.find_spec", lambda name: None)
        assert fails(capsys, *given, "--engine", "ray").endswith("pip install 'ketchup-cache[ray]'")
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ketchup-cache[ray]'")
    assert "start it on each machine" in fails(capsys, *given, "--engine", "ray", "--follow")
    nowhere = ScoreConfig(teacher="t", cache="c", engine="ray", ray_address="127.0.0.1:1")
    refuses(ConfigError, "no Ray cluster answers at 127.0.0.1:1 .*`ray start --head`", next, on_ray(nowhere, dict, [1]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(ConfigError, "start it without torchrun", next, on_ray(nowhere, dict, [1]))
