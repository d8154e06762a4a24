"""`export`: the rollouts of a cache as Parquet files or a Hugging Face dataset, for tools that do not know our format.

Segments are read one after another, so memory does not grow with the cache. The columns are in report/tables.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import ExportConfig
from ketchup_cache.console import printable, progress, size_text
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.files import publishing
from ketchup_cache.report.tables import schema, scored_tables, unscored_tables
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.version import TOOL

if TYPE_CHECKING:
    import pyarrow as pa

FILE_BYTES = 2**29
"""A Parquet file takes no further rows once they are so many bytes, before compression."""


@dataclass(frozen=True)
class ExportReport:
    """`scored`: rows that have scores. `tokens`: of the completions."""

    out: str
    format: str
    rows: int
    scored: int
    tokens: int
    files: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

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
    cache, began = open_cache(config.cache), time.monotonic()
    refs = cache.scored(config.scored_by, config.policy, keep_top=config.keep_top) if cache.teachers() else []
    bare = _unscored(cache, config) if config.unscored else []
    scored, more = sum(ref.rows for ref in refs), sum(stop - start for _, start, stop in bare)
    if not scored + more:
        what = "rollouts that fit" if config.unscored else "scored rollouts that fit; --unscored takes the others too"
        raise CacheError(f"{cache.address}: holds no {what}")

    def tables() -> Iterator[pa.Table]:
        for ref in refs:
            yield from scored_tables(cache, ref, config.keep_top)
        for part in bare:
            yield from unscored_tables(cache, *part, config.keep_top)

    tokens = 0

    def watched() -> Iterator[pa.Table]:
        nonlocal tokens
        for table in tables():
            yield table
            tokens += sum(len(chunk.values) for chunk in table["completion_tokens"].chunks)
            bar.advance(len(table))

    columns = schema(config.keep_top).with_metadata({"ketchup-cache": json.dumps(_about(cache))})
    write = write_parquet if config.to == "parquet" else write_dataset
    with publishing(config.out) as partial, progress("exporting", scored + more, "rollouts") as bar:
        write(partial, columns, watched())
        written = [path.stat().st_size for path in partial.rglob("*") if path.is_file()]
    seconds = round(time.monotonic() - began, 2)
    rows = scored + more
    return ExportReport(str(config.out), config.to, rows, scored, tokens, len(written), sum(written), seconds)


def write_parquet(folder: Path, columns: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """rows-00000.parquet, rows-00001.parquet, …; each table is a row group. Raises OSError."""
    import pyarrow.parquet as pq

    table, number = next(tables, None), 0
    while table is not None:
        size = 0
        with pq.ParquetWriter(folder / f"rows-{number:05d}.parquet", columns, compression="zstd") as writer:
            while table is not None and size < FILE_BYTES:
                writer.write_table(table)
                size, table = size + table.nbytes, next(tables, None)
        number += 1


def write_dataset(folder: Path, columns: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """What `datasets.load_from_disk` reads. Needs the space twice while it writes. Raises OSError."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    raw = folder / "raw.arrow"
    with pa.OSFile(str(raw), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        for table in tables:
            stream.write_table(table)
    mapped = datasets.Dataset.from_file(str(raw))
    mapped.save_to_disk(folder / "dataset")
    del mapped
    raw.unlink()
    for path in (folder / "dataset").iterdir():
        shutil.move(path, folder / path.name)
    (folder / "dataset").rmdir()


def _unscored(cache: Cache, config: ExportConfig) -> list[tuple[str, int, int]]:
    """(rollouts id, row_start, row_stop) of what has no scores by the chosen teacher."""
    wanted = cache.select_policy(config.policy).fingerprint if config.policy is not None else None
    of = {id_ for id_, info in cache.rollouts() if wanted in (None, info.policy.fingerprint)}
    if cache.teachers():
        teacher = cache.select_teacher(config.scored_by).fingerprint
        parts = cache.unscored(teacher, keep_top=config.keep_top)
    else:
        parts = [(id_, 0, manifest.rows) for id_, manifest in cache.manifests("rollouts")]
    return [part for part in parts if part[0] in of]


def _about(cache: Cache) -> dict[str, Any]:
    """For the files' metadata: what the numbers are of."""
    tokenizers = {m.info.tokenizer.fingerprint: m.info.tokenizer.model_dump() for _, m in cache.manifests()}
    return {
        "tool": TOOL,
        "cache": cache.address,
        "tokenizers": list(tokenizers.values()),
        "teachers": [teacher.model_dump() for teacher in cache.teachers()],
    }
