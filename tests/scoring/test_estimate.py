"""`score --estimate` against what `score` then does."""

import numpy as np
import pytest

from ketchup_cache.scoring import estimate as estimating
from ketchup_cache.scoring.estimate import estimate
from ketchup_cache.scoring.score import Scorer, score
from tests.helpers.models import save_model
from tests.helpers.oracle import random_rollouts
from tests.helpers.scoring import add_rollouts, options, segments


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), "1.1")


@pytest.mark.parametrize("more", [{}, {"keep_top": 8}, {"storage": "float16"}], ids=["plain", "top", "float16"])
def test_rows_segments_and_bytes_are_those_of_score(cache, teacher, monkeypatch, more):
    monkeypatch.setattr(estimating, "LEAST_S", 0.2)
    for seed in range(2):
        add_rollouts(cache, *random_rollouts(seed, 300, prompts=30), policy=seed)
    config = options(cache, teacher, commit_tokens=600, batch_tokens=4096, **more)
    found = estimate(config)
    assert segments(cache) == []
    report, stored = score(config), segments(cache)
    assert (found.rows, found.tokens) == (600, sum(entry.tokens for _, entry in stored))
    assert found.segments == report.segments == len(stored) > 2
    assert found.bytes == pytest.approx(sum(entry.data_bytes for _, entry in stored), rel=0.1)
    assert f"600 rollouts wait for teacher {found.teacher}: {found.tokens:,} completion tokens" in str(found)
    assert str(estimate(config)).startswith("nothing to do: all rollouts are scored")


def test_seconds_follow_the_tokens_that_the_teacher_reads(cache, teacher, monkeypatch):
    """Of a teacher that takes a millisecond a token, by a clock that nothing else moves."""
    clock, plain = [0.0], Scorer.scores

    def slow(scorer, prompts, rollouts, keep_top):
        clock[0] += 1e-3 * (len(rollouts.completions.values) + prompts.lengths[np.unique(rollouts.prompt_index)].sum())
        return plain(scorer, prompts, rollouts, keep_top)

    monkeypatch.setattr(Scorer, "scores", slow)
    monkeypatch.setattr(estimating.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(estimating, "LEAST_S", 0.5)
    add_rollouts(cache, *random_rollouts(0, 400, prompts=200))
    found = estimate(options(cache, teacher, batch_tokens=4096))
    assert found.timed_rows < 400
    assert found.seconds == pytest.approx(1e-3 * (found.tokens + found.prompt_tokens), rel=0.05)


def test_it_is_of_what_waits_now(cache, teacher):
    with pytest.raises(ValueError, match="--follow has no end"):
        options(cache, teacher, estimate=True, follow=True)
