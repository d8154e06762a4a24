"""A cache of format version 1, written by the program of that time, is read to the number, and grows."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import describe, verify
from ketchup_cache.sharing.transfer import copy
from tests.helpers.segments import fingerprint, make_prompts, make_scores, prompts_info, scores_info

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = dict(np.load(FIXTURES / "format-1-expected.npz"))
PER_TOKEN = ("q", "max_q", "logsumexp", "mean_q")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Plain scores in two segments, scores with four top logits, merged ones, float16 ones beside their original."""
    with zipfile.ZipFile(FIXTURES / "format-1.zip") as archive:
        archive.extractall(tmp_path)
    return open_cache(tmp_path / "format-1")


@pytest.mark.parametrize("name", ["plain", "top", "merged", "compacted"])
def test_every_number_is_read(cache: Cache, name: str) -> None:
    rows = list(cache.rows(policy=name))
    parts = [cache.load_scored(ref) for ref in cache.scored(policy=name)]
    names = (*PER_TOKEN, "behavior_logprob", "forced")
    joined = {key: np.concatenate([getattr(row, key) for row in rows]) for key in names}
    joined["completions"] = np.concatenate([row.completion_tokens for row in rows])
    joined["finished"] = np.array([row.finished for row in rows])
    joined["final_max_q"] = np.array([row.final_max_q for row in rows], np.float32)
    joined["prompt_index"] = np.concatenate([part.rollouts.prompt_index for part in parts])
    if name == "top":
        top = parts[0].scores.top
        joined |= {"top_q": top.q, "top_ids": top.ids, "rest_logsumexp": top.rest_logsumexp}
    for key, array in joined.items():
        np.testing.assert_array_equal(array, EXPECTED[f"{name}/{key}"], err_msg=key)
    prompts = cache.load_prompts(cache.scored(policy=name)[0].prompts_id)
    np.testing.assert_array_equal(prompts.tokens.values, EXPECTED["prompt_tokens"])
    np.testing.assert_array_equal(prompts.ids, EXPECTED["prompt_ids"])


def test_float16_segments_alone_are_read_within_their_rounding(cache: Cache, tmp_path: Path) -> None:
    """Without the original, the compact form of the same rows counts."""
    original = next(id_ for id_, info in cache.rollouts() if info.policy.name == "compacted")
    for path in (cache.path / "manifests").iterdir():
        if original in path.stem or f'"rollouts":"{original}"' in path.read_text():
            path.unlink()
    small = open_cache(cache.path)
    (ref,) = small.scored(policy="compacted")
    assert ref.rollouts_id != original
    part = small.load_scored(ref)
    for name, values in part.scores.per_token().items():
        exact = EXPECTED[f"compacted/{name}"]
        largest, q = EXPECTED["compacted/max_q"], EXPECTED["compacted/q"]
        scale = np.abs(q) + np.abs(largest - q) + np.abs(exact - largest)  # each was rounded
        np.testing.assert_array_less(np.abs(values - exact), 2.0**-11 * scale + 1e-5)
    behavior = EXPECTED["compacted/behavior_logprob"]
    np.testing.assert_array_less(np.abs(part.rollouts.behavior_logprob - behavior), -behavior * 2.0**-11 + 1e-7)


def test_it_is_whole_counted_once_copied_and_extended(cache: Cache, tmp_path: Path) -> None:
    assert verify(cache).ok
    info = describe(cache)
    assert (info.rollouts, info.completion_tokens, info.segments["rollouts"]) == (13, 50, 5)
    assert info.finished == sum(EXPECTED[f"{name}/finished"].sum() for name in ("plain", "top", "merged", "compacted"))
    assert cache.unscored(fingerprint("teacher")) == []
    copy(cache.path, tmp_path / "copy")
    other = open_cache(tmp_path / "copy")
    assert other.segment_ids() == cache.segment_ids()
    assert verify(other).ok
    rollouts_id = cache.rollouts()[0][0]
    scores = make_scores(cache.load_rollouts(rollouts_id), 0, 3)
    cache.commit_scores(scores, scores_info(rollouts_id, 0, 3, by="another"))
    cache.commit_prompts(make_prompts(seed=7), prompts_info())
    again = open_cache(cache.path)
    assert verify(again).ok
    assert [again.manifest(id_).version for id_, _ in again.manifests()][-2:] == [2, 2]
