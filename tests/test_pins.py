"""A run repeated from its pins, after its cache has grown, comes to the same weights."""

from __future__ import annotations

import json

import pytest
from caches import make_cache
from tiny import save_model

from ketchup_cache.config import LearnConfig
from ketchup_cache.errors import MismatchError
from ketchup_cache.learn.loop import learn


def test_a_pinned_run_repeats_itself_and_refuses_another_cache(tmp_path):
    student, teacher = save_model(tmp_path / "s", "1.0", seed=1), save_model(tmp_path / "t", "1.1", seed=2)
    cache = make_cache(tmp_path / "cache", student, teacher)

    def run(out, **options):
        options = {"student": str(student), "cache": cache.path, "batch_size": 4, "steps": 3, "lr": 1e-2} | options
        return learn(LearnConfig(out=tmp_path / out, **options))

    first = run("first")
    pins = json.loads((tmp_path / "first" / "pins.json").read_text())["segments"]
    assert sorted(pins) == sorted(id_ for id_, _ in cache.manifests())
    make_cache(cache.path, student, teacher, seed=7)
    assert run("grown").fingerprint != first.fingerprint
    assert run("again", pin=tmp_path / "first" / "pins.json").fingerprint == first.fingerprint
    other = make_cache(tmp_path / "other", student, teacher)
    with pytest.raises(MismatchError, match="lacks 3 of the 3"):
        run("refused", pin=tmp_path / "first" / "pins.json", cache=other.path)
