"""Merging is a union of sets: commutative, associative, idempotent. Hypothesis drives caches against plain sets.

KETCHUP_SOAK=1: 200 machines of 50 steps; without it a short form.
"""

import os
import tempfile
import uuid
from functools import cache as once
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.segment_bytes import Packed, read_manifest, read_segment
from ketchup_cache.sharing.stores import open_store
from ketchup_cache.sharing.transfer import copy, merge
from tests.helpers.segments import contents, fill

EXAMPLES, STEPS = (200, 50) if os.environ.get("KETCHUP_SOAK") else (5, 20)
CACHES = range(3)
ran: list[int] = []


@pytest.fixture(scope="module", autouse=True)
def _say_how_many():
    yield
    print(f"merge laws: {len(ran)} machines, {sum(ran)} steps")


@once
def families() -> list[list[Packed]]:
    """Prompts, their rollouts, and two scores segments of these; each after its parent."""
    with tempfile.TemporaryDirectory() as folder:
        cache, made, remote = open_cache(folder, create=True), [], open_store(folder)
        for seed in range(20):
            ids = fill(cache, sizes=([2, 1], [3, 2], [(0, 1), (1, 2)]), seed=seed)
            made.append([read_segment(remote, id_, *read_manifest(remote, id_)) for id_ in ids])
        return made


class MergeLaws(RuleBasedStateMachine):
    """Two folders and an object store (in memory) under commits and merges in any order."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        memory = f"memory://{uuid.uuid4().hex}/cache"
        self.caches = [f"{self.folder.name}/a", f"{self.folder.name}/b", memory]
        self.model: list[set[str]] = [set() for _ in CACHES]
        self.steps = 0
        for address in self.caches:
            open_store(address).create()

    @rule(i=st.sampled_from(CACHES), family=st.integers(0, 19), member=st.integers(0, 3))
    def commit(self, i, family, member):
        """Different caches may commit the same segment. A member brings its parents along."""
        segments = families()[family]
        chain = [*segments[: min(member, 2)], segments[member]]
        open_store(self.caches[i]).put(chain)
        self.model[i] |= {packed.segment_id for packed in chain}

    @rule(a=st.sampled_from(CACHES), b=st.sampled_from(CACHES), into=st.sampled_from(CACHES))
    def merge(self, a, b, into):
        missing = (self.model[a] | self.model[b]) - self.model[into]
        report = merge([self.caches[a], self.caches[b]], self.caches[into])
        assert sum(sum(part.segments.values()) for part in report.parts) == len(missing)
        self.model[into] |= self.model[a] | self.model[b]

    @rule(a=st.sampled_from(CACHES), b=st.sampled_from(CACHES))
    def copy_again(self, a, b):
        copy(self.caches[a], self.caches[b])
        self.model[b] |= self.model[a]
        assert copy(self.caches[a], self.caches[b]).bytes == 0

    @invariant()
    def sets_agree(self):
        self.steps += 1
        assert [set(open_store(address).segment_ids()) for address in self.caches] == self.model

    def teardown(self):
        a, b, c = self.caches
        left, right, bc = (Path(self.folder.name) / name for name in ("left", "right", "bc"))
        merge([a, b], left)
        merge([left, c], left)
        merge([c, b], bc)
        merge([bc, a], right)
        assert set(open_cache(left).segment_ids()) == set(open_cache(right).segment_ids()) == set().union(*self.model)
        assert contents(left) == contents(right)
        assert verify(open_cache(left)).ok
        self.folder.cleanup()
        ran.append(self.steps)


TestMergeLaws = MergeLaws.TestCase
slow = [HealthCheck.too_slow]
TestMergeLaws.settings = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, suppress_health_check=slow)
