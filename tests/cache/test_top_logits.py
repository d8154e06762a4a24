"""The kept largest logits in the cache: what is stored, what is refused, and what a smaller number of them means."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import describe, verify
from ketchup_cache.errors import CacheError, CorruptError
from ketchup_cache.types import Scores
from tests.helpers.errors import refuses
from tests.helpers.hostile import both, forge, removed, replaced, said
from tests.helpers.segments import VOCAB, fill, fingerprint, make_rollouts, make_scores, same, scores_of


def fill_top(cache: Cache, top: int, **info) -> tuple[str, Scores]:
    return fill(cache, forced=False, top=top, **info)[2], make_scores(make_rollouts(), 0, 3, top=top)


@pytest.mark.parametrize("top", [1, 4, VOCAB - 1, VOCAB])
def test_round_trip(cache: Cache, top: int) -> None:
    id_, scores = fill_top(cache, top)
    loaded = open_cache(cache.path).load_scores(id_)
    assert same(loaded, scores)
    assert not any(array.flags.writeable for array in vars(loaded.top).values())
    # nothing is left outside of the whole vocabulary, so nothing is stored of it
    assert ("rest_logsumexp" in cache.manifest(id_).arrays) == (top < VOCAB)
    assert cache.manifest(id_).arrays["top_ids"].dtype == "uint16"
    assert verify(cache).ok


@pytest.mark.parametrize(("vocab", "top"), [(32_100, 1), (32_100, 64), (500, 3), (32_100, 32_099)])
def test_equal_logits_are_within_the_rules_after_rounding(cache: Cache, vocab: int, top: int) -> None:
    """Every bound is met exactly there, and float16 bends it: also where a few logits are far below."""
    rollouts = make_rollouts()
    tokens = rollouts.completions.values
    logits = np.zeros((len(tokens), vocab), np.float32)
    logits[3:, vocab // 2 :] = -17.3
    scores = scores_of(logits, tokens, np.where(rollouts.finished, 0, 1).astype(np.float32), top)
    *_, id_ = fill(cache, scores, forced=False, vocab_size=vocab, storage="compact")
    read = open_cache(cache.path).load_scores(id_)
    np.testing.assert_allclose(read.top.rest_logsumexp, scores.top.rest_logsumexp, atol=0.02)


def test_arrays_that_are_missing_or_too_many(cache: Cache) -> None:
    def without(*names):
        def change(manifest, files):
            for name in names:
                del manifest["arrays"][name]
                for key in [key for key in files if key.startswith(f"{name}/")]:
                    del files[key]

        return change

    segment_id, scores = fill_top(cache, 4)
    wide_ids = both(replaced("top_ids", scores.top.ids.astype(np.uint32)), said("arrays", "top_ids", dtype="uint32"))
    for change, match in (
        (without("rest_logsumexp"), "arrays?"),
        (without("top_ids"), "arrays?"),
        (without("top_q", "top_ids", "rest_logsumexp"), "arrays?"),
        (said("info", keep_top=5), None),
        (both(said("info", keep_top=0), without("top_q", "top_ids")), None),  # a rest of nothing
        (wide_ids, None),
        (said("info", keep_top=VOCAB + 1), None),
    ):
        forged = forge(cache, segment_id, change, keep=True)
        refuses(CorruptError, match, open_cache(cache.path).load_scores, forged)
        removed(cache.path, forged)
    open_cache(cache.path).load_scores(segment_id)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_not_committed_with_another_number_than_info_says(cache: Cache, number: int) -> None:
    segment_id, scores = fill_top(cache, 4)
    info = cache.manifest(segment_id).info.model_copy(update={"keep_top": number})
    refuses(CacheError, f"top_q has 4 logits of each state, must be {number}", cache.commit_scores, scores, info)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 60), st.integers(1, 12), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_fewer_logits_are_those_that_would_have_been_kept(seed: int, scale: float, top: int, data) -> None:
    """`with_top` of more is what a scorer with fewer stores; and parts with different numbers join at the smallest."""
    fewer = data.draw(st.integers(0, top))
    rng = np.random.default_rng(seed)
    logits = (rng.normal(0, scale, (5, 12))).astype(np.float32)
    tokens, final = rng.integers(0, 12, 5), np.zeros(5, np.float32)
    many, few = scores_of(logits, tokens, final, top), scores_of(logits, tokens, final, fewer)
    cut = many.with_top(fewer)
    joined = Scores.concatenate([many, few])
    assert cut.keep_top == joined.keep_top == fewer
    if fewer:
        assert same(cut.top.q, few.top.q)
        assert same(cut.top.ids, few.top.ids)
        np.testing.assert_allclose(cut.top.rest_logsumexp, few.top.rest_logsumexp, rtol=3e-7, atol=3e-6)
        both = np.concatenate([cut.top.rest_logsumexp, few.top.rest_logsumexp])
        np.testing.assert_array_equal(joined.top.rest_logsumexp, both)
    refuses(ValueError, "logits of scores that keep", few.with_top, fewer + 1)


def test_info_gives_bytes_per_token_of_each_choice_of_score(cache: Cache) -> None:
    fill_top(cache, 4)
    _, scores = fill_top(cache, 0, by="another")
    assert scores.keep_top == 0
    info = describe(cache)
    assert list(info.sizes) == ["prompts", "rollouts", "scores", "scores, --keep-top 4"]
    (id_,) = (id_ for id_, m in cache.manifests("scores") if m.info.keep_top)
    paths = (cache.path / f"segments/{id_}/arrays.zip", cache.path / f"manifests/{id_}.json")
    assert info.sizes["scores, --keep-top 4"] == sum(path.stat().st_size for path in paths) / 14
    assert "scores, --keep-top 4: " in str(info)
    assert json.loads(json.dumps(info.to_dict()))["sizes"]["scores"] > 0
    assert fingerprint("teacher") in {t["fingerprint"] for t in info.teachers}
