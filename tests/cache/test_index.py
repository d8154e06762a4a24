"""Which rollouts are scored, by whom; every scored row once; what `info` says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ketchup_cache import open_cache
from ketchup_cache.cache.index import gaps
from ketchup_cache.cache.inspect import describe
from ketchup_cache.errors import CacheError
from ketchup_cache.types import Scores
from tests.helpers import segments as made
from tests.helpers.errors import refuses

examples = settings(derandomize=True, deadline=None, max_examples=200)

LENGTHS = (5, 0, 7, 1, 2, 3)


class Family:
    """Prompts, one segment of six rollouts, and scores of any range of them."""

    def __init__(self, root: Path) -> None:
        self.cache = open_cache(root, create=True)
        self.prompts = made.make_prompts()
        self.prompts_id = made.add_prompts(self.cache)
        self.rollouts = made.make_rollouts(LENGTHS, forced=True, seed=3)
        self.rollouts_id = self.draw("student")
        self.whole = made.make_scores(self.rollouts, 0, 6, seed=1)

    def draw(self, policy: str) -> str:
        info = made.rollouts_info(self.prompts_id, 3, policy=policy, samples=2)
        return self.cache.commit_rollouts(self.rollouts, info)

    def part(self, start: int, stop: int) -> Scores:
        return self.whole.rows(self.rollouts.completions, start, stop)

    def score(self, start: int, stop: int, by: str = "teacher", rollouts_id: str | None = None) -> str:
        info = made.scores_info(rollouts_id or self.rollouts_id, start, stop, by=by)
        return self.cache.commit_scores(self.part(start, stop), info)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "cache")


def test_overlapping_scorers_give_every_row_once(family: Family) -> None:
    cache = family.cache
    first, second, third = family.score(1, 3), family.score(0, 5), family.score(2, 4)
    refs = cache.scored()
    wanted = [(first, 1, 3), (second, 0, 1), (second, 3, 5)]
    assert [(ref.scores_id, ref.row_start, ref.row_stop) for ref in refs] == wanted
    assert third not in {ref.scores_id for ref in refs}
    (of_all,) = {(ref.rollouts_id, ref.prompts_id, ref.samples) for ref in refs}
    assert of_all == (family.rollouts_id, family.prompts_id, 2)
    assert [ref.rows for ref in refs] == [2, 1, 2]
    assert cache.unscored(made.fingerprint("teacher")) == [(family.rollouts_id, 5, 6)]
    assert cache.unscored(made.fingerprint("nobody")) == [(family.rollouts_id, 0, 6)]
    family.score(5, 6)
    assert cache.unscored(made.fingerprint("teacher")) == []
    # what was listed before stays as it was: new commits only append
    assert cache.scored()[:3] == refs


def test_joined_rows_are_the_rows_of_the_whole(family: Family) -> None:
    """Whatever the cuts, row i of the rollouts meets row i of the scores, and its own prompt."""
    cache = family.cache
    for start, stop in ((1, 3), (0, 5), (4, 6)):
        family.score(start, stop)
    ends = np.cumsum(LENGTHS)
    order = [row for ref in cache.scored() for row in range(ref.row_start, ref.row_stop)]
    assert sorted(order) == list(range(6))
    rows = list(cache.rows())
    assert len(rows) == 6
    for row, i in zip(rows, order, strict=True):
        tokens = slice(ends[i] - LENGTHS[i], ends[i])
        prompt = family.rollouts.prompt_index[i]
        assert row.prompt_id == bytes(family.prompts.ids[prompt]).hex()
        assert row.prompt_tokens.tolist() == family.prompts.tokens[prompt].tolist()
        assert row.completion_tokens.tolist() == family.rollouts.completions.values[tokens].tolist()
        for name in ("behavior_logprob", "forced"):
            assert made.same(getattr(row, name), getattr(family.rollouts, name)[tokens])
        for name in ("q", "max_q", "logsumexp", "mean_q"):
            assert made.same(getattr(row, name), getattr(family.whole, name)[tokens])
        assert row.finished is bool(family.rollouts.finished[i])
        assert row.final_max_q == family.whole.final_max_q[i]
        assert (row.policy, row.teacher) == ("student", "teacher")
    assert {row.finished for row in rows} == {True, False}
    assert any(row.forced.any() for row in rows)


def test_one_teacher_needs_no_selector_and_several_do(family: Family) -> None:
    cache = family.cache
    refuses(CacheError, r"no scores yet; run `ketchup-cache score", cache.rows)
    family.score(0, 6)
    assert cache.select_teacher(None).name == "teacher"
    assert cache.scored() == cache.scored("teacher") == cache.scored(made.fingerprint("teacher")[:8])
    family.score(0, 3, by="flan")
    assert [t.name for t in cache.teachers()] == ["teacher", "flan"]
    for ask in (cache.rows, cache.scored):
        caught = refuses(CacheError, ".", ask)
        message = caught
        assert "\n" not in message
        for part in ("--scored-by", "teacher", "flan", made.fingerprint("flan")[:12]):
            assert part in message
    assert len(list(cache.rows(teacher="flan"))) == 3
    assert len(list(cache.rows(teacher="teacher"))) == 6
    refuses(CacheError, r"no teacher `falcon` in this cache; it has teacher \(.*\), flan", cache.scored, "falcon")


def test_a_name_shared_by_two_fingerprints_is_ambiguous(family: Family) -> None:
    family.score(0, 6)
    info = made.scores_info(family.rollouts_id, 0, 6)
    namesake = info.teacher.model_copy(update={"fingerprint": made.fingerprint("other weights")})
    family.cache.commit_scores(family.whole, info.model_copy(update={"teacher": namesake}))
    refuses(CacheError, "`teacher` is more than one teacher", family.cache.select_teacher, "teacher")
    assert family.cache.select_teacher(made.fingerprint("other weights")[:10]) == namesake


def test_a_model_is_chosen_by_any_spelling_of_its_path_and_as_info_prints_it(family: Family) -> None:
    family.draw("/lab/step-10")
    (_, line), *_ = [line.split(None, 1) for line in str(describe(family.cache)).splitlines() if "/lab/" in line]
    for shown in (
        "/lab/step-10/",
        "/lab/./other/../step-10",
        line.partition(":")[0],
        f"({made.fingerprint('x')[:12]})",
    ):
        if shown[0] == "(":
            refuses(CacheError, "no policy", family.cache.select_policy, shown)
        else:
            assert family.cache.select_policy(shown).name == "/lab/step-10"


def test_policies(family: Family) -> None:
    cache = family.cache
    step_10 = family.draw("step-10")
    family.score(0, 6)
    family.score(1, 4, rollouts_id=step_10)
    assert [p.name for p in cache.policies()] == ["student", "step-10"]
    assert [(ref.policy.name, ref.rows) for ref in cache.scored()] == [("student", 6), ("step-10", 3)]
    assert [(ref.policy.name, ref.rows) for ref in cache.scored(policy="step-10")] == [("step-10", 3)]
    assert len(list(cache.rows(policy="student"))) == 6
    refuses(CacheError, "no policy `x` in this cache; it has student", cache.scored, policy="x")
    with pytest.raises(CacheError, match=r"no rollouts yet; run `ketchup-cache rollout"):
        open_cache(cache.path.parent / "new", create=True).select_policy("student")


def test_commits_of_others_show_up_after_a_refresh(family: Family) -> None:
    reader = open_cache(family.cache.path)
    assert [kind for _, m in reader.manifests() for kind in [m.kind]] == ["prompts", "rollouts"]
    segment_id = family.score(0, 6)
    assert reader.manifests("scores") == []
    reader.refresh()
    assert [i for i, _ in reader.manifests("scores")] == [segment_id]
    assert reader.scored()[0].scores_id == segment_id


def test_only_the_last_two_segments_stay_decoded_shared_and_read_only(family: Family) -> None:
    cache = family.cache
    ids = [made.add_prompts(cache, (), seed=i) for i in range(3)]
    with pytest.raises(ValueError, match="read-only"):
        cache.load_rollouts(family.rollouts_id).behavior_logprob[0] = 1
    first = cache.load_prompts(ids[0])
    cache.load_prompts(ids[1])
    assert cache.load_prompts(ids[0]) is first  # also where the segment is empty, and so false
    cache.load_prompts(ids[2])
    assert cache.load_prompts(ids[0]) is first
    cache.load_prompts(ids[1])
    cache.load_prompts(ids[2])
    assert cache.load_prompts(ids[0]) is not first


places = st.integers(0, 12)
ranges = st.lists(places, min_size=2, max_size=2, unique=True).map(sorted)


@examples
@given(places, places, st.lists(ranges, max_size=5))
def test_gaps_are_what_is_left(start: int, stop: int, covered: list[list[int]]) -> None:
    left = gaps(start, stop, [(a, b) for a, b in covered])
    touched = {i for a, b in covered for i in range(a, b)}
    assert [i for a, b in left for i in range(a, b)] == [i for i in range(start, stop) if i not in touched]
    # as few pieces as there can be
    assert all(a < b for a, b in left)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(left))


def test_info(family: Family) -> None:
    cache = family.cache
    family.score(1, 3)
    family.score(0, 4)
    family.score(0, 6, by="flan")
    family.draw("step-10")
    info = describe(cache)
    assert info.segments == {"prompts": 1, "rollouts": 2, "scores": 3}
    assert (info.prompts, info.rollouts, info.completion_tokens) == (3, 12, 36)
    assert info.finished == 2 * family.rollouts.finished.sum()
    on_disk = [p for folder in ("manifests", "segments") for p in (cache.path / folder).rglob("*") if p.is_file()]
    assert info.bytes == sum(p.stat().st_size for p in on_disk)
    assert [(t["name"], t["scored"], t["unscored"]) for t in info.teachers] == [("teacher", 4, 8), ("flan", 6, 6)]
    assert [(p["name"], p["rollouts"]) for p in info.policies] == [("student", 6), ("step-10", 6)]
    assert len(info.sampling) == len(info.tokenizers) == len(info.data) == 1
    assert json.loads(json.dumps(info.to_dict()))["teachers"][1]["name"] == "flan"
    for part in ("12 (36 tokens)", "flan", "4 scored, 8 not yet", "3 scores", "samples 2"):
        assert part in str(info)


def test_info_of_an_empty_cache_and_of_control_characters(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    info = describe(cache)
    assert (info.rollouts, info.bytes, info.listing) == (0, 0, [])
    assert "0 rollouts" in str(info)
    made.fill(cache, by="red\x1b[31m\r\n")
    assert "red\ufffd[31m\ufffd\ufffd" in str(describe(cache))
