"""What a cache holds (`info`), what another one lacks (`info A B`), and whether every byte is right (`verify`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ketchup_cache.cache import rules
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.disk import FolderStore, delete, move_aside, orphans, weigh
from ketchup_cache.cache.index import Entry, Index, check_parent, distinct, parent_id, read_entry
from ketchup_cache.cache.manifest import KINDS, PromptsInfo, ScoresInfo
from ketchup_cache.cache.segment_bytes import in_parallel, read_segment
from ketchup_cache.console import Report, printable, size_text
from ketchup_cache.errors import CacheError, KetchupError
from ketchup_cache.provenance import Mismatch

Record = dict[str, Any]


@dataclass(frozen=True)
class CacheInfo(Report):
    """What `info` prints. Counts are over the whole cache; rows that are stored twice count once.

    finished: rollouts that ended in EOS before the length limit. policies, teachers: with the rows of each. sampling:
    every different setting that rollouts were drawn with. engine: `Mismatch` of those that engines drew. listing: every
    segment, in the order of commits.
    """

    path: str
    rollouts: int
    finished: int
    completion_tokens: int
    policies: list[Record]
    teachers: list[Record]
    tokenizers: list[Record]
    data: list[Record]
    sampling: list[Record]
    listing: list[Record]
    engine: Record | None = None

    @property
    def segments(self) -> dict[str, int]:
        """Number of segments by kind."""
        return {kind: sum(e["kind"] == kind for e in self.listing) for kind in KINDS}

    @property
    def prompts(self) -> int:
        return sum(e["rows"] for e in self.listing if e["kind"] == "prompts")

    @property
    def bytes(self) -> int:
        """Of all manifests and data."""
        return sum(e["bytes"] for e in self.listing)

    @property
    def sizes(self) -> dict[str, float]:
        """Bytes per token by kind of segment, and by the options of `score` that decide its size."""
        tokens, sizes = Counter[str](), Counter[str]()
        for e in self.listing:
            tokens[e["stores"]] += e["tokens"]
            sizes[e["stores"]] += e["bytes"]
        return {label: sizes[label] / tokens[label] for label in sorted(sizes) if tokens[label]}

    def __str__(self) -> str:
        share = f", {self.finished / self.rollouts:.1%} finished" if self.rollouts else ""
        lines = [
            ("cache", self.path),
            ("segments", ", ".join(f"{count:,} {kind}" for kind, count in self.segments.items())),
            ("prompts", f"{self.prompts:,}"),
            ("rollouts", f"{self.rollouts:,} ({self.completion_tokens:,} tokens){share}"),
            ("size", size_text(self.bytes)),
            *(("", f"{label}: {size:.1f} bytes per token") for label, size in self.sizes.items()),
            *(("data", f"{_id(d)}, template {d['template']!r}") for d in self.data),
            *(("tokenizer", f"{_id(t)}, {t['vocab_size']:,} tokens") for t in self.tokenizers),
            *(("sampling", ", ".join(f"{key} {value}" for key, value in s.items())) for s in self.sampling),
            *([("engine", str(Mismatch(**self.engine)))] if self.engine else []),
            *(("policy", f"{_id(p)}{_step(p)}: {p['rollouts']:,} rollouts") for p in self.policies),
            *(("teacher", f"{_id(t)}, {t['dtype']}: {t['scored']:,} scored, {t['unscored']:,} not yet")
              for t in self.teachers),
            *(("written by", tool) for tool in sorted({e["tool"] for e in self.listing})),
            *[("created", f"{e[0]['created']} to {e[-1]['created']}") for e in [self.listing] if e],
        ]  # fmt: skip
        return "\n".join(f"{label:<11} {printable(text)}" for label, text in lines)


def describe(cache: Cache) -> CacheInfo:
    """Sum up a cache from its manifests. Raises CorruptError where one is damaged, CacheError for a missing parent."""
    index, manifests = cache.index, cache.index.entries
    drawn, scored = Counter[str](), Counter[str]()
    finished = 0
    for id_, info in index.rollouts:
        drawn[info.policy.fingerprint] += manifests[id_].rows
        # version 1 does not count them in its manifests
        finished += int(cache.load_rollouts(id_).finished.sum()) if info.finished is None else info.finished
    for ref in index.scored():
        scored[ref.teacher.fingerprint] += ref.rows
    engine = Mismatch.of_all([(manifests[id_].tokens, info.engine) for id_, info in index.rollouts if info.engine])
    total, of_teachers = drawn.total(), [(t, scored[t.fingerprint]) for t in cache.teachers()]
    return CacheInfo(
        path=cache.address,
        rollouts=total,
        finished=finished,
        completion_tokens=sum(manifests[id_].tokens for id_, _ in index.rollouts),
        policies=[p.model_dump() | {"rollouts": drawn[p.fingerprint]} for p in cache.policies()],
        teachers=[t.model_dump() | {"scored": n, "unscored": total - n} for t, n in of_teachers],
        tokenizers=[t.model_dump() for t in distinct(m.info.tokenizer for m in manifests.values())],
        data=_different(m.info.data for m in manifests.values() if isinstance(m.info, PromptsInfo)),
        sampling=_different(info.sampling for _, info in index.rollouts),
        listing=[_entry(id_, m) for id_, m in manifests.items()],
        engine=engine.model_dump() if engine else None,
    )


# ---------------------------------------------------------------------------------------------------- info A B


@dataclass(frozen=True)
class Difference(Report):
    """What each of two caches has that the other lacks. both: segments that are in both."""

    only: dict[str, list[Record]]
    both: int

    def __str__(self) -> str:
        lines = [f"in both: {self.both:,} segments"]
        for cache, entries in self.only.items():
            lines.append(f"only in {cache}: {len(entries):,} segments, {size_text(sum(e['bytes'] for e in entries))}")
            rows: Counter[tuple[str, str]] = Counter()
            for e in entries:
                rows[e["kind"], e["model"]] += e["rows"]
            lines += [f"  {count:,} rows of {kind}: {model}" for (kind, model), count in rows.items()]
        return "\n".join(map(printable, lines))


def compare(one: Cache, other: Cache) -> Difference:
    """From the manifests alone."""
    ids = [set(cache.segment_ids()) for cache in (one, other)]
    only = {}
    for cache, missing in ((one, ids[0] - ids[1]), (other, ids[1] - ids[0])):
        only[cache.address] = [_entry(id_, cache.entry(id_)) for id_ in cache.segment_ids() if id_ in missing]
    return Difference(only, len(ids[0] & ids[1]))


# ------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class VerifyReport(Report):
    """problems: one line each. bytes: that were read and found right. leftovers: of commits in progress or that a
    crash ended: entries of tmp/ and their data. They are harmless: readers never look at them.
    deleted: leftovers that are gone now (`clean`); kept: those that are too young. damaged: ids of the segments with
    problems, and of all that were made from them; aside: those that are out of the way now (`set_aside`)."""

    path: str
    segments: int
    bytes: int
    problems: tuple[str, ...]
    leftovers: tuple[str, ...]
    deleted: tuple[str, ...] = ()
    kept: int = 0
    damaged: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "all right" if self.ok else f"{len(self.problems):,} problem{'s' * (len(self.problems) != 1)}"
        lines = [f"{self.path}: {verdict}; {self.segments:,} segments, {size_text(self.bytes)} checked", *self.problems]
        if self.leftovers:
            lines.append(f"{len(self.leftovers):,} harmless leftovers of interrupted commits (`verify --clean`)")
        lines += [f"deleted {name}" for name in self.deleted] + [f"set aside {id_}" for id_ in self.aside]
        if self.kept:
            lines.append(f"{self.kept:,} leftovers are too young to delete: a writer may be at work on them")
        return "\n".join(map(printable, lines))


def verify(cache: Cache, *, deep: bool = True) -> VerifyReport:
    """Read and hash every byte again; `deep`: decode it and check every rule of the format. Collects all problems."""
    store = getattr(cache.store, "source", cache.store)  # the address itself, not what is kept of it here

    def tried(work: Callable[..., Any], *args: Any) -> Any:
        """What the work returns, or its error in one line."""
        try:
            return work(*args)
        except KetchupError as error:
            return str(error)

    ids, shared = sorted(store.segment_ids()), dict[Any, Any]()
    read_one = lambda id_: tried(lambda: read_entry(store, id_, shared)[0])  # noqa: E731
    found = dict(zip(ids, in_parallel(read_one, ids), strict=True))
    manifests = {id_: read for id_, read in found.items() if not isinstance(read, str)}
    problems = [read for read in found.values() if isinstance(read, str)]
    damaged = dict.fromkeys(id_ for id_, read in found.items() if isinstance(read, str))
    fresh, right = Cache(store, Index(manifests, cache.address)), 0
    # the children of one parent side by side, so that it is decoded once
    for id_, manifest in sorted(manifests.items(), key=lambda m: (KINDS.index(m[1].kind), parent_id(m[1].info), m[0])):
        said = [tried(fresh.load, id_) if deep else tried(check_parent, manifest.info, manifests, id_)]
        if not deep or isinstance(said[0], str):  # loading may have stopped at the parent
            said.append(tried(lambda id_: read_segment(store, id_, fresh.manifest(id_), b""), id_))
        wrong = [text for text in said if isinstance(text, str)]
        problems += wrong
        damaged |= {id_: None} if wrong or parent_id(manifest.info) in damaged else {}
        right += 0 if wrong else manifest.data_bytes
    said = tried(lambda: list(_disputes(fresh, set(manifests) - damaged.keys())))
    problems += said if isinstance(said, list) else []
    parents = {parent_id(m.info) for m in manifests.values()}
    left, lost = orphans(store.path, parents) if isinstance(store, FolderStore) else ([], [])
    todo = "bring it back from a copy, or `ketchup-cache verify --set-aside`"
    problems += [f"{path}: its manifest is lost, for no commit of it was cut short; {todo}" for path in lost]
    damaged |= {path.name: None for path in lost}
    names = tuple(str(path.relative_to(cache.address)) for path in left)
    # once each: a damaged parent is found by each of its children too
    said_once = tuple(dict.fromkeys(problems))
    return VerifyReport(cache.address, len(manifests), right, said_once, names, damaged=tuple(damaged))


def _disputes(cache: Cache, whole: set[str]) -> Iterator[str]:
    """A line for each two scores segments that disagree about the same rows of one teacher, with who wrote them."""

    def who(segment_id: str) -> str:
        by = cache.entry(segment_id).author
        with suppress(AttributeError, OSError, KeyError):  # at an address, files have no owner
            by = by or (cache.path / "manifests" / f"{segment_id}.json").owner()
        return f"{segment_id[:12]} of {cache.entry(segment_id).created}" + f" by {by}" * bool(by)

    earlier: dict[tuple[str, str], list[tuple[str, ScoresInfo]]] = {}
    for id_, manifest in cache.manifests("scores"):
        if id_ not in whole or not isinstance(info := manifest.info, ScoresInfo):
            continue
        others = earlier.setdefault((cache.index.original[info.rollouts], info.teacher.fingerprint), [])
        for other, theirs in others:
            start, stop = max(info.row_start, theirs.row_start), min(info.row_stop, theirs.row_stop)
            if start >= stop:
                continue
            completions, cut = cache.load_rollouts(info.rollouts).completions, []
            for name, of in ((other, theirs), (id_, info)):
                own = completions.slice(of.row_start, of.row_stop)
                cut.append(cache.load_scores(name).rows(own, start - of.row_start, stop - of.row_start))
            count, most = rules.apart(info.teacher.dtype, *cut)
            if count:
                what = (
                    f"{count:,} numbers of rows {start} to {stop} of rollouts {info.rollouts[:12]}, by up to {most:.3g}"
                )
                who_wrote = f"scores {who(other)}, and {who(id_)}, of teacher {info.teacher.name}"
                yield f"{who_wrote}, disagree about {what}; use ids that you trust (`learn --pin`)"
        others.append((id_, info))


def set_aside(cache: Cache, ids: Iterable[str]) -> None:
    """Move segments out of the way, to the folder `aside` of the cache, so that the others can be used.

    Raises CacheError for a cache at an address, WriteError.
    """
    if not isinstance(cache.store, FolderStore):
        raise CacheError(f"{cache.address}: --set-aside is for folders; pull what is whole, and use that")
    for segment_id in ids:
        move_aside(cache.store.path, segment_id)


def clean(cache: Cache, *, hours: float = 24.0, dry_run: bool = False) -> tuple[tuple[str, ...], int]:
    """Delete leftovers of interrupted commits that were untouched for so many hours; which, and how many are younger.

    A commit renames its data to segments/ and right after that its manifest: the age must be longer than that takes,
    and than clocks of machines differ. Data whose manifest is lost stays.
    Raises CacheError for a cache at an address, CorruptError where tmp/ or segments/ is a link, WriteError.
    """
    store = cache.store
    if not isinstance(store, FolderStore):
        raise CacheError(f"{cache.address}: --clean is for folders; the next push completes what a killed one has left")
    limit, gone, young = time.time() - hours * 3600, [], 0
    for path in orphans(store.path, {parent_id(m.info) for m in cache.index.entries.values()})[0]:
        if weigh(path)[0] > limit:
            young += 1
        elif dry_run or delete(store.path, path):
            gone.append(str(path.relative_to(store.path)))
    return tuple(gone), young


def _entry(segment_id: str, manifest: Entry) -> Record:
    """A segment in one line. model: the data of prompts, the policy of rollouts, the teacher of scores."""
    info = manifest.info
    top = f", --keep-top {info.keep_top}" if isinstance(info, ScoresInfo) and info.keep_top else ""
    compact = ", float16" if not isinstance(info, PromptsInfo) and info.storage == "compact" else ""
    model = {"prompts": "data", "rollouts": "policy", "scores": "teacher"}[info.kind]
    return {
        **{name: getattr(manifest, name) for name in ("kind", "rows", "tokens", "created", "tool", "author")},
        "id": segment_id,
        "bytes": manifest.data_bytes + manifest.manifest_bytes,
        "stores": manifest.kind + compact + top,
        "model": _id(getattr(info, model).model_dump()),
        "parent": parent_id(info) or None,
    }


def _different(records: Iterable[BaseModel]) -> list[Record]:
    return [record.model_dump() for record in dict.fromkeys(records)]


def _id(record: Record) -> str:
    return f"{record['name']} ({record['fingerprint'][:12]})"


def _step(policy: Record) -> str:
    return "" if policy["step"] is None else f", step {policy['step']:,}"
