"""Rollouts and their scores as Arrow tables, one row for each rollout: what `export` writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.provenance import TeacherInfo
from ketchup_cache.types import Prompts, Ragged, Rollouts, Scores

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 2048
"""Of one table: a prompt is repeated for each of its completions, which can be more than its segment holds."""
PER_TOKEN = ("q", "max_q", "logsumexp", "mean_q")


def schema(keep_top: int) -> pa.Schema:
    """Columns and types. Those of scores are null where a rollout has none."""
    import pyarrow as pa

    columns = {
        "prompt_id": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "completion_tokens": pa.list_(pa.int32()),
        "finished": pa.bool_(),
        "forced": pa.list_(pa.bool_()),
        "behavior_logprob": pa.list_(pa.float32()),
        **dict.fromkeys(PER_TOKEN, pa.list_(pa.float32())),
        "final_max_q": pa.float32(),
        "policy": pa.string(),
        "policy_fingerprint": pa.string(),
        "policy_step": pa.int64(),
        "teacher": pa.string(),
        "teacher_fingerprint": pa.string(),
        "rollouts_segment": pa.string(),
        "row": pa.int64(),
    }
    if keep_top:
        columns |= {"top_q": pa.list_(pa.list_(pa.float32())), "top_ids": pa.list_(pa.list_(pa.int32()))}
    return pa.schema(list(columns.items()))


def scored_tables(cache: Cache, ref: ScoredRef, keep_top: int) -> Iterator[pa.Table]:
    """The rows of one reference, `ROWS` at a time. Raises what `Cache.load_scored` raises."""
    part = cache.load_scored(ref)
    info = cache.manifest(ref.rollouts_id).info
    assert isinstance(info, RolloutsInfo)
    scores = part.scores.with_top(min(keep_top, part.scores.keep_top))
    for start in range(0, len(part), ROWS):
        rows = np.arange(start, min(start + ROWS, len(part)))
        cut = scores.take(part.rollouts.completions, rows)
        place = ref.row_start + rows
        yield _table(part.prompts, part.rollouts.take(rows), cut, info, ref.teacher, ref.rollouts_id, place, keep_top)


def unscored_tables(cache: Cache, rollouts_id: str, start: int, stop: int, keep_top: int) -> Iterator[pa.Table]:
    """Rows of a rollouts segment without scores."""
    info = cache.manifest(rollouts_id).info
    assert isinstance(info, RolloutsInfo)
    prompts, rollouts = cache.load_prompts(info.prompts), cache.load_rollouts(rollouts_id)
    for first in range(start, stop, ROWS):
        rows = np.arange(first, min(first + ROWS, stop))
        yield _table(prompts, rollouts.take(rows), None, info, None, rollouts_id, rows, keep_top)


def _table(
    prompts: Prompts,
    rollouts: Rollouts,
    scores: Scores | None,
    info: RolloutsInfo,
    teacher: TeacherInfo | None,
    rollouts_id: str,
    rows: NDArray[np.int64],
    keep_top: int,
) -> pa.Table:
    import pyarrow as pa

    columns, count = schema(keep_top), len(rollouts)

    def lists(values: NDArray, ragged: Ragged) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(ragged.offsets, pa.int32()), pa.array(values))

    def same(value: object, name: str) -> pa.Array:
        return pa.repeat(pa.scalar(value, columns.field(name).type), count)

    completions, own_prompts = rollouts.completions, prompts.tokens.take(rollouts.prompt_index)
    arrays = {
        "prompt_id": pa.array([prompts.ids[i].tobytes().hex() for i in rollouts.prompt_index], pa.string()),
        "prompt_tokens": lists(own_prompts.values, own_prompts),
        "completion_tokens": lists(completions.values, completions),
        "finished": pa.array(rollouts.finished),
        "forced": lists(rollouts.forced, completions),
        "behavior_logprob": lists(rollouts.behavior_logprob, completions),
        "policy": same(info.policy.name, "policy"),
        "policy_fingerprint": same(info.policy.fingerprint, "policy_fingerprint"),
        "policy_step": same(info.policy.step, "policy_step"),
        "teacher": same(teacher and teacher.name, "teacher"),
        "teacher_fingerprint": same(teacher and teacher.fingerprint, "teacher_fingerprint"),
        "rollouts_segment": same(rollouts_id, "rollouts_segment"),
        "row": pa.array(rows, pa.int64()),
    }
    if scores is not None:
        arrays |= {name: lists(values, completions) for name, values in scores.per_token().items()}
        arrays["final_max_q"] = pa.array(scores.final_max_q)
        if keep_top:
            top = scores.top
            assert top is not None
            width = np.arange(0, top.q.size + 1, max(scores.keep_top, 1), dtype=np.int32)
            for name, values in (("top_q", top.q), ("top_ids", top.ids)):
                each = pa.ListArray.from_arrays(pa.array(width), pa.array(values.reshape(-1)))
                arrays[name] = pa.ListArray.from_arrays(pa.array(completions.offsets, pa.int32()), each)
    full = [arrays[f.name] if f.name in arrays else pa.nulls(count, f.type) for f in columns]
    return pa.Table.from_arrays(full, schema=columns)
