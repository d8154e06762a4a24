"""Rewriting a cache: half the size, in few segments, every row once, with the error that is documented."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ketchup_cache.cache import float16 as halves
from ketchup_cache.cache.cache import Cache, open_cache
from ketchup_cache.cache.inspect import describe, verify
from ketchup_cache.cli import main
from ketchup_cache.config.commands import CompactConfig
from ketchup_cache.errors import ConfigError, NumericsError
from ketchup_cache.sharing.compact import compact
from ketchup_cache.types import Scores
from tests.cache.test_hostile import forge, refused, replaced
from tests.helpers.segments import (
    VOCAB,
    exit_code,
    in_child,
    make_prompts,
    make_rollouts,
    make_scores,
    prompts_info,
    rollouts_info,
    same,
    scores_info,
)

LENGTHS = (5, 2, 7, 0, 4, 3)


def small_segments(root: Path) -> Cache:
    """Six rollouts, scored a few rows at a time by two scorers at once, and by a second teacher."""
    cache = open_cache(root, create=True)
    prompts = cache.commit_prompts(make_prompts(), prompts_info())
    rollouts = make_rollouts(LENGTHS, forced=True)
    id_ = cache.commit_rollouts(rollouts, rollouts_info(prompts, 3))
    for start, stop in ((0, 2), (1, 4), (3, 4), (4, 6)):
        cache.commit_scores(make_scores(rollouts, start, stop, seed=start), scores_info(id_, start, stop))
    cache.commit_scores(make_scores(rollouts, 2, 5, seed=9), scores_info(id_, 2, 5, by="another"))
    return cache


def run(cache: Cache, into: Path, **options: object):
    return compact(CompactConfig(cache=cache.path, into=into, **options))


def by_prompt(cache: Cache, teacher: str):
    return [(row.prompt_id, row) for row in cache.rows(teacher)]


def test_compact_merges_every_row_once_with_the_documented_error(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    report = run(cache, tmp_path / "d")
    small = open_cache(tmp_path / "d")
    assert (report.segments, report.rows, report.tokens) == (4, 9, 21 + 11)  # prompts, rollouts, a segment a teacher
    for teacher, rows in (("teacher", 6), ("another", 3)):
        before, after = list(cache.rows(teacher)), list(small.rows(teacher))
        assert len(before) == len(after) == rows
        for one, other in zip(before, after, strict=True):
            for name in ("prompt_tokens", "completion_tokens", "forced"):
                assert same(getattr(one, name), getattr(other, name))
            assert (one.prompt_id, one.finished, one.final_max_q) == (
                other.prompt_id,
                other.finished,
                other.final_max_q,
            )
            gap, half = one.max_q - one.q, np.float32(2**-11)
            np.testing.assert_array_less(abs(other.q - one.q), abs(one.q) * half + 1e-7)
            np.testing.assert_array_less(abs(other.max_q - other.q - gap), gap * half + 1e-5)
            np.testing.assert_array_less(
                abs(other.behavior_logprob - one.behavior_logprob), -one.behavior_logprob * half + 1e-7
            )
            for name, error in report.errors.items():
                if name != "gap":
                    assert abs(getattr(one, name) - getattr(other, name)).max(initial=0) <= error
            assert other.q.dtype == other.behavior_logprob.dtype == np.float32
            assert (other.q <= other.max_q).all()
            assert (other.max_q <= other.logsumexp).all()
            assert (other.mean_q <= other.max_q).all()
    assert 0 < report.errors["gap"] < 0.016
    report = verify(small)
    assert report.ok, str(report)
    for _, manifest in small.manifests():
        if manifest.kind != "prompts":
            assert manifest.info.storage == "compact"
            floats = {e.dtype for name, e in manifest.arrays.items() if "float" in e.dtype and name != "final_max_q"}
            assert floats == {"float16"}
    assert "storage     compact" in str(describe(small))
    assert "storage" not in str(describe(cache))


def test_run_again_it_brings_over_only_what_is_new(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    run(cache, tmp_path / "d")
    before = open_cache(tmp_path / "d").manifests()
    assert "nothing to do" in str(run(cache, tmp_path / "d"))
    assert open_cache(tmp_path / "d").manifests() == before
    (rollouts_id, _) = cache.rollouts()[0]
    rollouts = cache.load_rollouts(rollouts_id)
    cache.commit_scores(make_scores(rollouts, 0, 4, seed=3), scores_info(rollouts_id, 0, 4, by="another"))
    report = run(cache, tmp_path / "d")
    assert (report.segments, report.rows) == (1, 2)  # rows 2 and 3 were there
    assert len(list(open_cache(tmp_path / "d").rows("another"))) == 5
    assert verify(open_cache(tmp_path / "d")).ok


def test_the_same_sources_make_the_same_segments(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    run(cache, tmp_path / "d")
    run(cache, tmp_path / "e")
    assert open_cache(tmp_path / "d").manifests() == open_cache(tmp_path / "e").manifests()


def test_lossless_and_compact_in_one_cache_count_once_and_lossless_wins(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    rows, info = list(cache.rows("teacher")), describe(cache)
    unscored = cache.unscored(scores_info("0" * 64, 0, 0, by="another").teacher.fingerprint)
    compact(CompactConfig(cache=cache.path, into=tmp_path / "d"))
    small = open_cache(tmp_path / "d")
    for segment_id, manifest in small.manifests():  # as a merge by hand does it
        for name in manifest.files:
            target = cache.path / "segments" / segment_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((small.path / "segments" / segment_id / name).read_bytes())
        name = f"manifests/{segment_id}.json"
        (cache.path / name).write_bytes((small.path / name).read_bytes())
    both = open_cache(cache.path)
    assert len(both.manifests()) == len(cache.manifests()) > len(small.manifests())
    for one, other in zip(rows, both.rows("teacher"), strict=True):
        assert same(one.q, other.q)
        assert same(one.behavior_logprob, other.behavior_logprob)
    assert len(both.rollouts()) == 1
    assert both.rollouts()[0][1].storage == "lossless"
    assert both.unscored(scores_info("0" * 64, 0, 0, by="another").teacher.fingerprint) == unscored
    again = describe(both)
    assert (again.rollouts, again.completion_tokens, again.teachers) == (
        info.rollouts,
        info.completion_tokens,
        info.teachers,
    )
    # rows that only the compact form has scores of are there too
    (lossless_id, _), (compact_id, _) = cache.rollouts()[0], small.rollouts()[0]
    rollouts = cache.load_rollouts(lossless_id)
    both.commit_scores(make_scores(rollouts, 0, 2, seed=4), scores_info(compact_id, 0, 2, by="another"))
    assert [(ref.rollouts_id, ref.row_start, ref.row_stop) for ref in both.scored("another")] == [
        (lossless_id, 2, 5),
        (compact_id, 0, 2),
    ]
    assert both.unscored(scores_info("0" * 64, 0, 0, by="another").teacher.fingerprint) == [(lossless_id, 5, 6)]


def test_lossless_storage_merges_and_changes_no_number(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    report = run(cache, tmp_path / "d", storage="lossless")
    merged = open_cache(tmp_path / "d")
    assert merged.rollouts() == cache.rollouts()
    assert len(merged.manifests("scores")) == 2
    assert set(report.errors.values()) == {0.0}
    for one, other in zip(cache.rows("teacher"), merged.rows("teacher"), strict=True):
        assert all(same(getattr(one, n), getattr(other, n)) for n in ("q", "max_q", "logsumexp", "mean_q"))
    # what is compact stays so, and says so
    run(cache, tmp_path / "small")
    run(open_cache(tmp_path / "small"), tmp_path / "e", storage="lossless")
    assert open_cache(tmp_path / "e").rollouts() == open_cache(tmp_path / "small").rollouts()
    assert {m.info.storage for _, m in open_cache(tmp_path / "e").manifests("scores")} == {"compact"}


def test_segments_end_at_the_limit(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    run(cache, tmp_path / "d", segment_tokens=9)
    written = [m for _, m in open_cache(tmp_path / "d").manifests("scores")]
    assert [(m.rows, m.tokens) for m in written if m.info.teacher.name == "teacher"] == [(2, 7)] * 3
    assert verify(open_cache(tmp_path / "d")).ok


floats = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1000, 1000, width=32))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(floats, st.data())
def test_errors_are_those_of_one_rounding(q: np.ndarray, data: st.DataObject) -> None:
    up = hnp.arrays(np.float32, len(q), elements=st.floats(0, 500, width=32))
    gap, over, under = (data.draw(up) for _ in range(3))
    max_q = q + gap
    scores = Scores(q, max_q, max_q + over, max_q - under, np.zeros(1, np.float32))
    read = halves.restore(halves.shrink(scores))
    rounding = 2.0**-11
    exact = {name: np.float64(value) for name, value in vars(scores).items()}
    got = {name: np.float64(value) for name, value in vars(read).items()}
    for name, sign in (("q", -1), ("logsumexp", 1), ("mean_q", -1)):
        want = sign * (exact[name] - exact["max_q"])
        have = sign * (got[name] - got["max_q"])
        assert (abs(have - want) <= abs(want) * rounding + 2e-4).all()  # float32 near 1000 errs by 6e-5
        assert (have >= 0).all()
    assert (abs(got["q"] - exact["q"]) <= abs(exact["q"]) * rounding + 2.0**-25).all()
    # written again, nothing more is lost than float32 loses
    again = halves.restore(halves.shrink(read))
    assert same(again.q, read.q)
    assert (abs(np.float64(again.max_q) - read.max_q) <= 2e-4).all()


def test_gaps_up_to_16_err_by_at_most_4_thousandths() -> None:
    """The figure in the documentation, over every float32 step that matters."""
    gap = np.linspace(0, 16, 1_000_001, dtype=np.float32)
    zero = np.zeros_like(gap)
    read = halves.restore(halves.shrink(Scores(-gap, zero, zero, -gap, zero[:1])))
    error = abs((read.max_q - read.q) - gap).max()
    assert 0.0038 < error <= 2**-8


def test_uniform_logits_are_within_the_rules_after_rounding(tmp_path: Path) -> None:
    """logsumexp may lie log(vocab_size) above the maximum, and float16 rounds that up."""
    vocab = next(v for v in range(30_000, 32_000) if float(np.float16(math.log(v))) - math.log(v) > 0.003)
    cache = open_cache(tmp_path / "c", create=True)
    prompts = cache.commit_prompts(make_prompts(vocab_size=vocab), prompts_info(vocab))
    rollouts = make_rollouts(vocab_size=vocab)
    id_ = cache.commit_rollouts(rollouts, rollouts_info(prompts, 3, vocab_size=vocab))
    zero = np.zeros(14, np.float32)
    scores = Scores(zero, zero, zero + np.float32(math.log(vocab)), zero, np.zeros(3, np.float32))
    cache.commit_scores(scores, scores_info(id_, 0, 3, vocab_size=vocab))
    run(cache, tmp_path / "d")
    assert verify(open_cache(tmp_path / "d")).ok


@pytest.mark.parametrize(("name", "value"), [("q", -70_000), ("logsumexp", 1e5), ("max_q", 69_999), ("mean_q", -1e5)])
def test_what_float16_can_not_hold_is_refused(name: str, value: float) -> None:
    zero = np.zeros(3, np.float32)
    scores = replace(Scores(zero, zero, zero, zero, zero), **{name: np.array([0, value, 0], np.float32)})
    with pytest.raises(NumericsError, match=r"\[1\] is .* float16 ends at 65504: keep these scores lossless") as caught:
        halves.shrink(scores)
    assert "\n" not in str(caught.value)


def test_refused_scores_leave_a_cache_that_is_whole(tmp_path: Path, capsys) -> None:
    cache = open_cache(tmp_path / "c", create=True)
    prompts = cache.commit_prompts(make_prompts(), prompts_info())
    rollouts = make_rollouts()
    id_ = cache.commit_rollouts(rollouts, rollouts_info(prompts, 3))
    scores = make_scores(rollouts, 0, 3)
    low = np.array(scores.q)
    low[4] = -1e6
    cache.commit_scores(replace(scores, q=low), scores_info(id_, 0, 3))
    assert main(["compact", str(cache.path), "--into", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert verify(open_cache(tmp_path / "d")).ok
    assert open_cache(tmp_path / "d").manifests("scores") == []


def test_hostile_compact_segments(tmp_path: Path) -> None:
    cache = small_segments(tmp_path / "c")
    for name, value, match in (
        ("gap", -1, r"q\[2\] is larger than max_q"),
        ("gap", np.inf, r"max_q\[2\] is inf"),
        ("q", np.nan, r"q\[2\] is nan"),
        ("logsumexp_gap", -1, r"logsumexp\[2\] is smaller than max_q"),
        ("logsumexp_gap", math.log(VOCAB) + 0.2, r"logsumexp\[2\] is larger than max_q \+ log"),
        ("mean_gap", -1, r"mean_q\[2\] is larger than max_q"),
    ):
        into = tmp_path / f"{name} {value}"
        run(cache, into)
        small = open_cache(into)
        segment_id = small.manifests("scores")[0][0]
        path = small.path / "segments" / segment_id
        array = np.array(zarr.open_group(path, mode="r", zarr_format=3)[name])
        assert array.dtype == np.float16  # any Zarr reads it
        array[2] = value
        forge(small, segment_id, replaced(name, array))
        refused(into, match=match)


def test_the_command_line(tmp_path: Path, capsys) -> None:
    cache = small_segments(tmp_path / "c")
    assert main(["compact", str(cache.path), "--into", str(tmp_path / "d"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 9
    assert printed["errors"]["gap"] < 0.016
    assert main(["compact", str(cache.path), "--into", str(tmp_path / "d")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is the cache itself"):
        run(cache, tmp_path / "c")
    assert main(["compact", str(tmp_path / "none"), "--into", str(tmp_path / "e")]) == 2
    assert not (tmp_path / "e").exists()


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    """At every segment: the second run ends with what an undisturbed one makes."""
    cache = small_segments(tmp_path / "c")
    run(cache, tmp_path / "whole", segment_tokens=9)
    wanted = open_cache(tmp_path / "whole").manifests()
    for after in range(len(wanted)):
        into = tmp_path / f"killed {after}"

        def work(into: Path = into, after: int = after) -> None:
            import os

            from ketchup_cache.cache import disk as durable

            real, done = durable.Stage.commit, []

            def commit(stage, *args):
                if len(done) == after:
                    os._exit(9)
                real(stage, *args)
                done.append(1)

            durable.Stage.commit = commit
            run(cache, into, segment_tokens=9)

        assert exit_code(in_child(work)) == 9
        assert len(open_cache(into).manifests()) == after
        assert verify(open_cache(into)).ok
        run(cache, into, segment_tokens=9)
        assert open_cache(into).manifests() == wanted


def scores_with_top(rollouts, start: int, stop: int, top: int, seed: int) -> Scores:
    """Of real rows of logits; a full row keeps all of the vocabulary."""
    rng = np.random.default_rng(seed)
    tokens = rollouts.completions.slice(start, stop).values
    logits = rng.normal(0, 8, (len(tokens), VOCAB)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :top].astype(np.int32)
    largest = logits.max(axis=1)
    logsumexp = (largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))).astype(np.float32)
    q = logits[np.arange(len(tokens)), tokens]
    final = np.zeros(stop - start, np.float32)
    others = logits.copy()
    np.put_along_axis(others, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(others - largest[:, None]).sum(axis=1)) + largest
    return Scores(q, largest, logsumexp, logits.mean(axis=1), final, np.take_along_axis(logits, ids, 1), ids, rest)


@pytest.mark.parametrize("top", [1, 3, VOCAB])
def test_largest_logits_are_kept_and_win_over_scores_without_them(tmp_path: Path, top: int) -> None:
    cache = open_cache(tmp_path / "c", create=True)
    prompts = cache.commit_prompts(make_prompts(), prompts_info())
    rollouts = make_rollouts(LENGTHS)
    id_ = cache.commit_rollouts(rollouts, rollouts_info(prompts, 3))
    cache.commit_scores(make_scores(rollouts, 0, 6), scores_info(id_, 0, 6))
    run(cache, tmp_path / "d")  # before they were kept
    kept = scores_with_top(rollouts, 1, 4, top, 5)
    info = scores_info(id_, 1, 4).model_copy(update={"keep_top": top})
    cache.commit_scores(kept, info)
    report = run(cache, tmp_path / "d")
    assert (report.segments, report.rows) == (1, 3)
    run(cache, tmp_path / "e")
    for folder, segments in (("d", 2), ("e", 3)):
        small = open_cache(tmp_path / folder)
        assert verify(small).ok, str(verify(small))
        assert len(small.manifests("scores")) == segments
        (segment_id,) = [i for i, m in small.manifests("scores") if m.info.keep_top]
        read = small.load_scores(segment_id)
        assert same(read.top_ids, kept.top_ids)
        assert same(read.top_q[:, 0], read.max_q)
        rest_gap = kept.logsumexp - kept.rest_logsumexp
        if top < VOCAB:
            difference = abs(read.logsumexp - read.rest_logsumexp - rest_gap)
            np.testing.assert_array_less(difference, rest_gap * 2.0**-11 + 1e-5)
        else:
            assert (read.rest_logsumexp == -np.inf).all()
        gap = kept.max_q[:, None] - kept.top_q
        np.testing.assert_array_less(abs(read.max_q[:, None] - read.top_q - gap), gap * 2.0**-11 + 1e-5)
        assert [(r.row_start, r.row_stop) for r in small.scored(keep_top=top)] == [(1, 4)]
