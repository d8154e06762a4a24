"""`export`: the rollouts of a cache as Parquet files or a Hugging Face dataset, for tools that do not know our format.

Segments are read one after another, so memory does not grow with the cache. docs/sharing.md describes the columns.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.config.commands import ExportConfig
from ketchup_cache.console import Report, printable, progress, size_text
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.files import publishing
from ketchup_cache.provenance import PolicyInfo, TeacherInfo
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import Ragged, ScoredRollouts, Scores
from ketchup_cache.version import TOOL

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 2048
"""Of one table: a prompt is repeated for each of its completions, which can be more than its segment holds."""
FILE_BYTES = 2**29
"""Most of a Parquet file, about, before compression."""


@dataclass(frozen=True)
class ExportReport(Report):
    """`scored`: rows that have scores. `tokens`: of the completions."""

    out: str
    format: str
    rows: int
    scored: int
    tokens: int
    files: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return printable(
            f"{self.rows:,} rollouts ({self.tokens:,} tokens), {self.scored:,} of them scored, as {self.format} in "
            f"{self.out}: {self.files} files, {size_text(self.bytes)}, in {self.seconds:.1f} s"
        )


def export(config: ExportConfig) -> ExportReport:
    """Write OUT whole or not at all: a killed export leaves OUT.partial, which the next one replaces.

    Raises ConfigError where OUT is there already, CacheError where nothing fits or a segment is damaged, WriteError.
    """
    if config.out.exists():
        raise ConfigError([f"{config.out}: is there already; choose another folder, or delete it"])
    cache, began, tokens = open_cache(config.cache), time.monotonic(), 0
    refs = cache.scored(config.scored_by, config.policy, keep_top=config.keep_top) if cache.teachers() else []
    bare = _unscored(cache, config) if config.unscored else []
    scored, more = sum(ref.rows for ref in refs), sum(stop - start for _, _, start, stop in bare)
    if not scored + more:
        what = "rollouts that fit" if config.unscored else "scored rollouts that fit; --unscored takes the others too"
        raise CacheError(f"{cache.address}: holds no {what}")
    tokenizers = {m.info.tokenizer.fingerprint: m.info.tokenizer.model_dump() for _, m in cache.manifests()}
    teachers = [teacher.model_dump() for teacher in cache.teachers()]
    about = {"tool": TOOL, "cache": cache.address, "tokenizers": list(tokenizers.values()), "teachers": teachers}

    def tables() -> Iterator[pa.Table]:
        nonlocal tokens
        for part, segment, start, policy, teacher in _parts(cache, refs, bare, config.keep_top):
            tokens += len(part.rollouts.completions.values)
            for rows in np.split(np.arange(len(part)), range(ROWS, len(part), ROWS)):
                table = _table(part.take(rows), start + rows, segment, policy, teacher)
                yield table.replace_schema_metadata({"ketchup-cache": json.dumps(about)})
                bar.advance(len(rows))

    write = write_parquet if config.to == "parquet" else write_dataset
    with publishing(config.out) as partial, progress("exporting", scored + more, "rollouts") as bar:
        write(partial, tables())
        written = [path.stat().st_size for path in partial.rglob("*") if path.is_file()]
    counts = (scored + more, scored, tokens, len(written), sum(written))
    return ExportReport(str(config.out), config.to, *counts, round(time.monotonic() - began, 2))


def _unscored(cache: Cache, config: ExportConfig) -> list[tuple[str, RolloutsInfo, int, int]]:
    """(rollouts id, info, row_start, row_stop) of what has no scores by the chosen teacher."""
    wanted = cache.select_policy(config.policy).fingerprint if config.policy is not None else None
    infos = {id_: info for id_, info in cache.rollouts() if wanted in (None, info.policy.fingerprint)}
    teacher = cache.select_teacher(config.scored_by).fingerprint if cache.teachers() else ""
    found = cache.unscored(teacher, keep_top=config.keep_top)
    return [(id_, infos[id_], start, stop) for id_, start, stop in found if id_ in infos]


Part = tuple[ScoredRollouts, str, int, PolicyInfo, TeacherInfo | None]
"""Rows of a rollouts segment: its id, the first row's place in it, who sampled and who scored."""


def _parts(
    cache: Cache, refs: list[ScoredRef], bare: list[tuple[str, RolloutsInfo, int, int]], keep_top: int
) -> Iterator[Part]:
    """Without a teacher, scores are zeros."""
    for ref in refs:
        part = cache.load_scored(ref)
        part = replace(part, scores=part.scores.with_top(min(keep_top, part.scores.keep_top)))
        yield part, ref.rollouts_id, ref.row_start, ref.policy, ref.teacher
    for rollouts_id, info, start, stop in bare:
        rollouts = cache.load_rollouts(rollouts_id).rows(start, stop)
        scores = Scores.empty(len(rollouts.completions.values), len(rollouts), min(keep_top, 1))
        yield ScoredRollouts(cache.load_prompts(info.prompts), rollouts, scores), rollouts_id, start, info.policy, None


def _table(
    part: ScoredRollouts, rows: NDArray[np.int64], segment: str, policy: PolicyInfo, teacher: TeacherInfo | None
) -> pa.Table:
    """rows: places in the segment. Columns of scores are null without a teacher."""
    import pyarrow as pa

    rollouts, scores, completions = part.rollouts, part.scores, part.rollouts.completions
    prompts = part.prompts.tokens.take(rollouts.prompt_index)

    def lists(values: NDArray | pa.Array, ragged: Ragged = completions) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(ragged.offsets, pa.int32()), pa.array(values))

    def scored(array: pa.Array) -> pa.Array:
        return array if teacher else pa.nulls(len(rows), array.type)

    def same(value: object, kind: pa.DataType | None = None) -> pa.Array:
        return pa.array([value] * len(rows), kind or pa.string())

    columns = {
        "prompt_id": [part.prompts.ids[i].tobytes().hex() for i in rollouts.prompt_index],
        "prompt_tokens": lists(prompts.values, prompts),
        "completion_tokens": lists(completions.values),
        "finished": pa.array(rollouts.finished),
        "forced": lists(rollouts.forced),
        "behavior_logprob": lists(rollouts.behavior_logprob),
        **{name: scored(lists(values)) for name, values in scores.per_token().items()},
        "final_max_q": scored(pa.array(scores.final_max_q)),
        "policy": same(policy.name),
        "policy_fingerprint": same(policy.fingerprint),
        "policy_step": same(policy.step, pa.int64()),
        "teacher": same(teacher and teacher.name),
        "teacher_fingerprint": same(teacher and teacher.fingerprint),
        "rollouts_segment": same(segment),
        "row": pa.array(rows),
    }
    if top := scores.top:
        ends = pa.array(np.arange(0, top.q.size + 1, scores.keep_top, dtype=np.int32))
        for name, values in (("top_q", top.q), ("top_ids", top.ids)):
            columns[name] = scored(lists(pa.ListArray.from_arrays(ends, pa.array(values.reshape(-1)))))
    return pa.table(columns)


def write_parquet(folder: Path, tables: Iterator[pa.Table]) -> None:
    """rows-00000.parquet, rows-00001.parquet, …; each table is a row group. Raises OSError."""
    import pyarrow.parquet as pq

    table, number = next(tables, None), 0
    while table is not None:
        size = 0
        with pq.ParquetWriter(folder / f"rows-{number:05d}.parquet", table.schema, compression="zstd") as writer:
            while table is not None and size < FILE_BYTES:
                writer.write_table(table)
                size, table = size + table.nbytes, next(tables, None)
        number += 1


def write_dataset(folder: Path, tables: Iterator[pa.Table]) -> None:
    """What `datasets.load_from_disk` reads. Needs the space twice while it writes. Raises OSError."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    raw, first = folder / "raw" / "rows.arrow", next(tables)
    raw.parent.mkdir()
    with pa.OSFile(str(raw), "wb") as file, pa.ipc.new_stream(file, first.schema) as stream:
        for table in chain([first], tables):
            stream.write_table(table)
    datasets.Dataset.from_file(str(raw)).save_to_disk(folder)
    shutil.rmtree(raw.parent)
