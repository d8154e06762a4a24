"""What a cache holds, worked out from its manifests alone: which rollouts have scores, by which teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from ketchup_cache.cache.manifest import Info, Kind, Manifest, PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.cache.segment_bytes import SegmentStore, read_manifest
from ketchup_cache.errors import CacheError, CorruptError
from ketchup_cache.provenance import PolicyInfo, Record, TeacherInfo, TokenizerInfo, require_same_tokenizer

Model = TypeVar("Model", PolicyInfo, TeacherInfo, TokenizerInfo)
Range = tuple[str, int, int]
"""Rows start..stop of the rollouts segment with this id."""


class Entry(NamedTuple):
    """What an index keeps of a manifest; the rest is read when the segment is used.

    manifest_bytes: its length. content: of prompts, by which the same ones are known in two segments; else empty.
    """

    kind: Kind
    rows: int
    tokens: int
    created: str
    tool: str
    author: str
    data_bytes: int
    manifest_bytes: int
    content: str
    info: Info

    @classmethod
    def of(cls, manifest: Manifest, size: int, shared: dict[Any, Any]) -> Entry:
        """size: bytes of the manifest. shared: what many segments say alike, kept once for all of them."""
        info = manifest.info
        alike = {
            name: shared.setdefault(value, value) for name, value in vars(info).items() if isinstance(value, Record)
        }
        files = sorted(manifest.files.items()) if info.kind == "prompts" else ()
        said: dict[str, Any] = {name: getattr(manifest, name) for name in cls._fields[:7]}
        content = "".join(f"{name} {file.sha256} " for name, file in files)
        return cls(**said, manifest_bytes=size, content=content, info=info.model_copy(update=alike))


def read_entry(store: SegmentStore, segment_id: str, shared: dict[Any, Any]) -> tuple[Entry, bytes]:
    """Of a segment's manifest, with the manifest's bytes. Raises the errors of `read_manifest`."""
    manifest, data = read_manifest(store, segment_id)
    return Entry.of(manifest, len(data), shared), data


class ScoredRef(NamedTuple):
    """Rows row_start to row_stop of a rollouts segment, whose scores are in one scores segment.

    samples: completions per prompt. beside: scores segments of other teachers that hold these rows, too.
    """

    scores_id: str
    rollouts_id: str
    prompts_id: str
    row_start: int
    row_stop: int
    samples: int
    policy: PolicyInfo
    teacher: TeacherInfo
    beside: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start


class Index:
    """What the manifests of a cache say, in the order of commits (time, then id). It never changes: new segments, a new
    index."""

    def __init__(self, entries: Mapping[str, Entry], address: str) -> None:
        """address: of the cache, for messages."""
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].created, item[0])))
        self._address = address
        self._scored: dict[tuple[Any, ...], list[ScoredRef]] = {}

    @cached_property
    def rollouts(self) -> list[tuple[str, RolloutsInfo]]:
        """(id, info) of the rollouts segments. Of the same rows in float32 and in float16, those in float32."""
        chosen: dict[str, str] = {}
        for id_, original in self.original.items():
            chosen[original] = original if original in self.entries else chosen.get(original, id_)
        kept = set(chosen.values())
        return [(id_, m.info) for id_, m in self.entries.items() if id_ in kept and isinstance(m.info, RolloutsInfo)]

    @cached_property
    def original(self) -> dict[str, str]:
        """What stands for the rows of each rollouts segment, stored in float32 or in float16 (format version 1)."""
        return {id_: m.info.original or id_ for id_, m in self.entries.items() if isinstance(m.info, RolloutsInfo)}

    def scored(self, teacher: str | None = None, policy: str | None = None, keep_top: int = 0) -> list[ScoredRef]:
        """Every scored row once: where two scorers did the same rows, the first one's scores.

        teacher, policy: fingerprints; None for any. keep_top: only scores with at least this many of the largest
        logits; a vocabulary has at most all of its own.
        Raises CacheError where a parent is missing, MismatchError where its tokenizer is another.
        """
        if (asked := (teacher, policy, keep_top)) in self._scored:
            return self._scored[asked]
        done: dict[tuple[str, str], list[tuple[int, int]]] = {}
        refs: list[ScoredRef] = []
        for scores_id, manifest in self.entries.items():
            info = manifest.info
            if not isinstance(info, ScoresInfo) or teacher not in (None, info.teacher.fingerprint):
                continue
            if info.keep_top < min(keep_top, info.tokenizer.vocab_size):
                continue
            check_parent(info, self.entries, scores_id)
            parent = self.entries[info.rollouts].info
            assert isinstance(parent, RolloutsInfo)
            if policy not in (None, parent.policy.fingerprint):
                continue
            covered = done.setdefault((self.original[info.rollouts], info.teacher.fingerprint), [])
            rows = gaps(info.row_start, info.row_stop, covered)
            covered += rows
            made_by: Any = (parent.sampling.samples, parent.policy, info.teacher)
            refs += [ScoredRef(scores_id, info.rollouts, parent.prompts, *span, *made_by) for span in rows]
        return self._scored.setdefault(asked, refs)

    def scored_by_all(self, teachers: Sequence[str], policy: str | None = None, keep_top: int = 0) -> list[ScoredRef]:
        """As `scored`, the rows that all of these teachers have scored: refs of the first, the others `beside` them."""
        first, *others = (self.scored(teacher, policy, keep_top) for teacher in teachers)
        for other in others:
            there: dict[str, list[ScoredRef]] = {}
            for ref in other:
                there.setdefault(self.original[ref.rollouts_id], []).append(ref)
            pairs = ((ref, more) for ref in first for more in there.get(self.original[ref.rollouts_id], ()))
            spans = [(max(a.row_start, b.row_start), min(a.row_stop, b.row_stop), a, b) for a, b in pairs]
            first = [
                a._replace(row_start=start, row_stop=stop, beside=(*a.beside, b.scores_id))
                for start, stop, a, b in spans
                if start < stop
            ]
        return list(first)

    def unscored(self, teacher: str, keep_top: int = 0) -> list[Range]:
        """All rows without scores by the teacher with this fingerprint, or with fewer than `keep_top` logits."""
        covered: dict[str, list[tuple[int, int]]] = {}
        for ref in self.scored(teacher, keep_top=keep_top):
            covered.setdefault(self.original[ref.rollouts_id], []).append((ref.row_start, ref.row_stop))
        left = {id_: covered.get(self.original[id_], []) for id_, _ in self.rollouts}
        return [(id_, *span) for id_, done in left.items() for span in gaps(0, self.entries[id_].rows, done)]

    def models(self, what: str) -> list[Any]:
        """Every teacher that has scores here, or policy that has rollouts, once for each name and fingerprint."""
        return list(dict.fromkeys(getattr(m.info, what) for m in self.entries.values() if hasattr(m.info, what)))

    def select(self, what: str, selector: str | None, option: str) -> Any:
        """The one model with this name, however its path is spelt, or whose fingerprint starts so, or as `info` prints
        it; the only one where the selector is None.

        what: teacher or policy. option: the flag that selects. Raises CacheError where there is none or more than one.
        """
        if not (found := self.models(what)):
            made, command = ("scores", "score") if what == "teacher" else ("rollouts", "rollout")
            todo = f"run `ketchup-cache {command} --cache {self._address}` first"
            raise CacheError(f"{self._address}: no {made} yet; {todo}")
        shown = re.search(r"\(([0-9a-f]{12,64})\)", str(selector))
        start = shown[1] if shown else str(selector)
        place = os.path.realpath(str(selector))
        named = [model for model in found if selector is None or os.path.realpath(model.name) == place]
        chosen = distinct(named or [model for model in found if model.fingerprint.startswith(start)])
        if len(chosen) == 1:
            return chosen[0]
        if not chosen:
            raise CacheError(f"no {what} `{selector}` in this cache; it has {_listed(distinct(found))}")
        which = "the cache has" if selector is None else f"`{selector}` is"
        choose = f"choose one with {option} and the start of its fingerprint"
        raise CacheError(f"{which} more than one {what}: {_listed(chosen)}; {choose}")


def gaps(start: int, stop: int, covered: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of start..stop that no covered range touches."""
    left = []
    for begin, end in sorted(covered):
        if start < min(begin, stop):
            left.append((start, min(begin, stop)))
        start = max(start, end)
    return [*left, (start, stop)] if start < stop else left


def parent_id(info: Info) -> str:
    """Id of the segment that one was made from; empty for prompts."""
    return "" if isinstance(info, PromptsInfo) else info.rollouts if isinstance(info, ScoresInfo) else info.prompts


def check_parent(info: Info, known: Mapping[str, Entry], segment_id: str = "") -> None:
    """That a segment's parent is among known ones and fits. `segment_id` is empty for a segment still to be committed.

    Raises CorruptError where it is missing, of the wrong kind or too short, MismatchError for another tokenizer.
    """
    if isinstance(info, PromptsInfo):
        return
    if isinstance(info, ScoresInfo):
        kind, start, stop = "rollouts", info.row_start, info.row_stop
    else:
        kind, start, stop = "prompts", info.prompt_start, info.prompt_stop
    parent = known.get(parent_id(info))
    if parent and parent.info.tokenizer is info.tokenizer and parent.kind == kind and start <= stop <= parent.rows:
        return  # as nearly always; what follows says what is wrong
    what, parent_name = f"{info.kind} {segment_id[:12] or '(new)'}", f"{kind} {parent_id(info)[:12]}"
    if not parent:
        raise CorruptError(f"{what} needs {parent_name}, which is not in this cache; copy that segment too")
    if parent.kind != kind:
        raise CorruptError(f"{what} needs {parent_name}, but that is a segment of {parent.kind}")
    if not start <= stop <= parent.rows:
        raise CorruptError(f"{what} covers rows {start} to {stop} of {parent_name}, which has {parent.rows}")
    todo = f"{what} and {parent_name} must share a tokenizer; use the same one"
    require_same_tokenizer(info.tokenizer, parent.info.tokenizer, todo)


def distinct(found: Iterable[Model]) -> list[Model]:
    """Each fingerprint once, where it came first."""
    first: dict[str, Model] = {}
    for model in found:
        first.setdefault(model.fingerprint, model)
    return list(first.values())


def _listed(models: list[Any], most: int = 6) -> str:
    shown = ", ".join(f"{model.name} ({model.fingerprint[:12]})" for model in models[:most])
    return f"{shown} and {len(models) - most} more" if len(models) > most else shown
