"""`export`: the rollouts of a cache as Parquet files or a Hugging Face dataset, for tools that do not know our format.

Segments are read one after another, so memory does not grow with the cache. docs/sharing.md describes the columns.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import ExportConfig
from ketchup_cache.config.options import SelectOptions
from ketchup_cache.console import Report, printable, progress, size_text
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.files import publishing
from ketchup_cache.report.rows import Part, load_part, parts
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import PER_TOKEN, Row
from ketchup_cache.version import TOOL

FLOATS, TOKENS = pa.list_(pa.float32()), pa.list_(pa.int32())
OF_ROLLOUTS = {
    "prompt_id": pa.string(), "prompt_tokens": TOKENS, "completion_tokens": TOKENS, "finished": pa.bool_(),
    "forced": pa.list_(pa.bool_()), "behavior_logprob": FLOATS, "policy": pa.string(),
    "policy_fingerprint": pa.string(), "policy_step": pa.int64(), "rollouts_segment": pa.string(), "row": pa.int64(),
}  # fmt: skip
OF_SCORES = dict.fromkeys(PER_TOKEN, FLOATS) | {"final_max_q": pa.float32()}
OF_SCORES |= {"teacher": pa.string(), "teacher_fingerprint": pa.string()}
OF_TOP = {"top_q": pa.list_(FLOATS), "top_ids": pa.list_(TOKENS)}
"""With `keep_top`. These columns and those of OF_SCORES are null in rows without scores."""
ROWS = 256
"""Converted together, and one row group of the Parquet file."""


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
    found = list(parts(cache, config, keep_top=config.keep_top, unscored=config.unscored))
    rows, scored = (sum(stop - start for _, start, stop, *_, ref in found if ref or every) for every in (True, False))
    if not rows:
        what = "rollouts that fit" if config.unscored else "scored rollouts that fit; --unscored takes the others too"
        raise CacheError(f"{cache.address}: holds no {what}")
    schema = _schema(cache, config.keep_top)
    with publishing(config.out) as partial, progress("exporting", rows, "rollouts") as bar:
        file = partial / "rows.parquet"
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for part in found:
                for some in _rows(cache, part, config.keep_top):
                    writer.write_table(pa.Table.from_pylist(some, schema))
                    tokens += sum(len(row["completion_tokens"]) for row in some)
                    bar.advance(len(some))
        if config.to == "hf-dataset":
            datasets.disable_progress_bars()
            try:
                datasets.Dataset.from_parquet(str(file), cache_dir=str(partial / "raw")).save_to_disk(partial)
            except datasets.exceptions.DatasetGenerationError as error:  # around what the disk said
                raise error.__cause__ or error from None
            file.unlink()
            shutil.rmtree(partial / "raw")
        sizes = [path.stat().st_size for path in partial.rglob("*") if path.is_file()]
    counts = (rows, scored, tokens, len(sizes), sum(sizes))
    return ExportReport(str(config.out), config.to, *counts, round(time.monotonic() - began, 2))


def to_dataset(
    cache: Cache, *, teacher: str | None = None, policy: str | None = None, keep_top: int = 0, unscored: bool = False
) -> datasets.Dataset:
    """The rollouts of a cache in memory, one row each, with the columns of `export`; that is for those that are larger.

    teacher, policy, keep_top, unscored: as the options of `export`. Raises CacheError as `Cache.scored` does.
    """
    schema, select = _schema(cache, keep_top), SelectOptions(scored_by=teacher, policy=policy)
    found = parts(cache, select, keep_top=keep_top, unscored=unscored)
    tables = [pa.Table.from_pylist(some, schema) for part in found for some in _rows(cache, part, keep_top)]
    return datasets.Dataset(pa.concat_tables(tables) if tables else schema.empty_table())


def _schema(cache: Cache, keep_top: int) -> pa.Schema:
    """Of the columns, with the tokenizers and teachers of the cache as metadata."""
    tokenizers = {m.info.tokenizer.fingerprint: m.info.tokenizer.model_dump() for _, m in cache.manifests()}
    teachers = [teacher.model_dump() for teacher in cache.teachers()]
    about = {"tool": TOOL, "cache": cache.address, "tokenizers": list(tokenizers.values()), "teachers": teachers}
    columns = OF_ROLLOUTS | OF_SCORES | (OF_TOP if keep_top else {})
    return pa.schema(columns, {"ketchup-cache": json.dumps(about)})


def _rows(cache: Cache, part: Part, keep_top: int) -> Iterator[list[dict[str, Any]]]:
    """The columns of each row, a few rows at a time."""
    id_, start, _, _, policy, ref = part
    joined = load_part(cache, part, keep_top)
    shared = {"policy_fingerprint": policy.fingerprint, "policy_step": policy.step, "rollouts_segment": id_}
    shared |= {"teacher_fingerprint": ref.teacher.fingerprint} if ref else dict.fromkeys(OF_SCORES)
    shared |= {"mean_q": None} if ref and ref.teacher.served else {}

    def columns(i: int) -> dict[str, Any]:
        row = Row.of(joined, i, policy.name, ref.teacher.name if ref else "")
        top = {"top_q": list(row.top.q), "top_ids": list(row.top.ids)} if row.top else {}
        return vars(row) | shared | {"row": start + i} | top

    for first in range(0, len(joined), ROWS):
        yield [columns(i) for i in range(first, min(first + ROWS, len(joined)))]
