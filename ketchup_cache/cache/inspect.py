"""What a cache holds (`ketchup-cache info`), and whether every byte of it is right (`ketchup-cache verify`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ketchup_cache.cache import index as coverage
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import Manifest, RolloutsInfo, ScoresInfo
from ketchup_cache.cache.sizes import ArraySizes, array_sizes
from ketchup_cache.console import printable, size_text
from ketchup_cache.errors import KetchupError

KINDS = ("prompts", "rollouts", "scores")


@dataclass(frozen=True)
class PolicyUse:
    """A policy and how many rollouts it has."""

    name: str
    fingerprint: str
    step: int | None
    rollouts: int


@dataclass(frozen=True)
class TeacherUse:
    """A teacher and how many rollouts it has scored, each counted once, and not yet scored."""

    name: str
    fingerprint: str
    dtype: str
    scored: int
    unscored: int


@dataclass(frozen=True)
class CacheInfo:
    """Counts are over the whole cache. `str()` gives what `ketchup-cache info` prints."""

    path: str
    segments: dict[str, int]
    """By kind."""
    prompts: int
    prompt_tokens: int
    rollouts: int
    finished: int
    """Rollouts that ended in EOS before the length limit."""
    completion_tokens: int
    bytes: int
    """Of all manifests and the files they name."""
    storage: tuple[str, ...]
    """lossless, compact, or both."""
    arrays: tuple[ArraySizes, ...]
    """Where the bytes are: each array of each kind of segment."""
    policies: tuple[PolicyUse, ...]
    teachers: tuple[TeacherUse, ...]
    tokenizers: tuple[dict[str, Any], ...]
    data: tuple[dict[str, Any], ...]
    sampling: tuple[dict[str, Any], ...]
    """Every different setting that rollouts were drawn with."""
    authors: tuple[str, ...]
    """Who made segments, where they said so."""
    tools: tuple[str, ...]
    """Programs that wrote segments."""
    created: tuple[str, str] | None
    """First and last commit, UTC; None for an empty cache."""

    @property
    def bytes_per_completion_token(self) -> float | None:
        return self.bytes / self.completion_tokens if self.completion_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {
            "bytes_per_completion_token": self.bytes_per_completion_token,
            "arrays": [sizes.to_dict() for sizes in self.arrays],
        }

    def __str__(self) -> str:
        per_token = self.bytes_per_completion_token
        lines = [
            ("cache", self.path),
            ("segments", ", ".join(f"{count:,} {kind}" for kind, count in self.segments.items())),
            ("prompts", f"{self.prompts:,} ({self.prompt_tokens:,} tokens)"),
            (
                "rollouts",
                f"{self.rollouts:,} ({self.completion_tokens:,} tokens){_share(self.finished, self.rollouts)}",
            ),
            ("size", size_text(self.bytes) + (f" ({per_token:.1f} bytes per completion token)" if per_token else "")),
            *([("storage", " and ".join(self.storage))] if "compact" in self.storage else []),
            *(("", str(sizes)) for sizes in self.arrays if sizes.tokens),
            *(("data", f"{d['name']} ({d['fingerprint'][:12]}), template {d['template']!r}") for d in self.data),
            *(
                ("tokenizer", f"{t['name']} ({t['fingerprint'][:12]}), {t['vocab_size']:,} tokens")
                for t in self.tokenizers
            ),
            *(("sampling", ", ".join(f"{key} {value}" for key, value in s.items())) for s in self.sampling),
            *(
                ("policy", f"{p.name} ({p.fingerprint[:12]}){_step(p.step)}: {p.rollouts:,} rollouts")
                for p in self.policies
            ),
            *(
                ("teacher", f"{t.name} ({t.fingerprint[:12]}, {t.dtype}): {t.scored:,} scored, {t.unscored:,} not yet")
                for t in self.teachers
            ),
            *(("author", author) for author in self.authors),
            *(("written by", tool) for tool in self.tools),
            *([("created", f"{self.created[0]} to {self.created[1]}")] if self.created else []),
        ]
        # names come from manifests, which others may have written: no control characters to the terminal
        return "\n".join(f"{label:<11} {printable(text)}" for label, text in lines)


@dataclass(frozen=True)
class VerifyReport:
    """`problems`: one line each. Leftovers are harmless: readers never look at them."""

    path: str
    segments: int
    bytes: int
    """That were read and found right."""
    problems: tuple[str, ...]
    unfinished: int
    """Entries in tmp/: work in progress, or left by a crash."""
    orphans: int
    """Folders in segments/ without a manifest: a commit in progress, or left by a crash."""
    strays: int
    """Files in the folders of segments that no manifest names."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        verdict = "all right" if self.ok else f"{len(self.problems):,} problem{'s' * (len(self.problems) != 1)}"
        lines = [f"{self.path}: {verdict}; {self.segments:,} segments, {size_text(self.bytes)} checked", *self.problems]
        leftovers = (
            (self.unfinished, "unfinished in tmp/"),
            (self.orphans, "without a manifest in segments/"),
            (self.strays, "files that belong to no segment"),
        )
        if any(count for count, _ in leftovers):
            found = ", ".join(f"{count:,} {what}" for count, what in leftovers if count)
            lines.append(f"harmless leftovers, which may be deleted while nothing writes: {found}")
        return "\n".join(printable(line) for line in lines)


def describe(cache: Cache) -> CacheInfo:
    """Sum up a cache from its manifests and the `finished` arrays.

    Raises CorruptError where these are damaged, CacheError where a parent is missing.
    """
    manifests = dict(cache.manifests())
    of_kind = {kind: [m for m in manifests.values() if m.kind == kind] for kind in KINDS}
    once = coverage.rollouts(manifests)
    rollouts = [info for _, info in once]
    created = [manifest.created for manifest in manifests.values()]
    drawn = Counter[str]()
    for rollouts_id, info in once:
        drawn[info.policy.fingerprint] += manifests[rollouts_id].rows
    total = sum(drawn.values())
    scored = Counter[str]()
    for ref in coverage.scored(manifests):
        scored[ref.teacher.fingerprint] += ref.rows
    return CacheInfo(
        path=cache.address,
        segments={kind: len(found) for kind, found in of_kind.items()},
        prompts=sum(m.rows for m in of_kind["prompts"]),
        prompt_tokens=sum(m.tokens for m in of_kind["prompts"]),
        rollouts=total,
        finished=sum(int(cache.read_arrays(id_, manifests[id_], {"finished"})["finished"].sum()) for id_, _ in once),
        completion_tokens=sum(manifests[id_].tokens for id_, _ in once),
        storage=tuple(sorted({m.info.storage for m in manifests.values() if m.info.kind != "prompts"})),
        bytes=sum(len(m.to_bytes()) + data_bytes(m) for m in manifests.values()),
        arrays=array_sizes(manifests.values()),
        policies=tuple(
            PolicyUse(p.name, p.fingerprint, p.step, drawn[p.fingerprint])
            for p in coverage.distinct(info.policy for info in rollouts)
        ),
        teachers=tuple(
            TeacherUse(t.name, t.fingerprint, t.dtype, scored[t.fingerprint], total - scored[t.fingerprint])
            for t in cache.teachers()
        ),
        tokenizers=_different(m.info.tokenizer.model_dump() for m in manifests.values()),
        data=_different(m.info.data.model_dump() for m in of_kind["prompts"] if m.info.kind == "prompts"),
        sampling=_different(info.sampling.model_dump() for info in rollouts),
        authors=tuple(sorted({manifest.author for manifest in manifests.values() if manifest.author})),
        tools=tuple(sorted({manifest.tool for manifest in manifests.values()})),
        created=(min(created), max(created)) if created else None,
    )


def verify(cache: Cache, *, deep: bool = True) -> VerifyReport:
    """Read and hash every byte again; `deep`: decode it and check every rule of the format. Collects all problems."""
    fresh = cache.reopened()
    manifests: dict[str, Manifest] = {}
    problems: dict[str, None] = {}  # an ordered set: a damaged parent is found by each of its children too
    for segment_id in sorted(fresh.segment_ids()):
        try:
            manifests[segment_id] = fresh.manifest(segment_id)
        except KetchupError as error:
            problems[str(error)] = None
    right = 0
    for segment_id in sorted(manifests, key=lambda segment_id: _family(segment_id, manifests[segment_id])):
        found = _problems(fresh, segment_id, manifests, deep)
        problems |= dict.fromkeys(found)
        right += 0 if found else data_bytes(manifests[segment_id])
    on_disk = cache.address == str(cache.path)  # an address elsewhere shows no leftovers
    folders = {i: cache.path / "segments" / i for i in manifests if on_disk}
    known = set(fresh.segment_ids())
    return VerifyReport(
        path=cache.address,
        segments=len(manifests),
        bytes=right,
        problems=tuple(problems),
        unfinished=len(_names(cache.path / "tmp")) if on_disk else 0,
        orphans=sum(name not in known for name in _names(cache.path / "segments")) if on_disk else 0,
        strays=sum(len(_files(folder) - manifests[i].files.keys()) for i, folder in folders.items()),
    )


def _problems(cache: Cache, segment_id: str, manifests: dict[str, Manifest], deep: bool) -> list[str]:
    manifest = manifests[segment_id]
    try:
        if isinstance(manifest.info, RolloutsInfo | ScoresInfo):
            coverage.check_parent(manifest.info, manifests.get(coverage.parent_id(manifest.info)), segment_id)
        if not deep or cache.address != str(cache.path):
            cache.check_bytes(segment_id, manifest)
        if not deep:
            return []
    except KetchupError as error:
        return [str(error)]
    load = {"prompts": cache.load_prompts, "rollouts": cache.load_rollouts, "scores": cache.load_scores}[manifest.kind]
    try:
        load(segment_id)
    except KetchupError as error:
        found = [str(error)]
    else:
        return []
    # the load stopped at the first problem, maybe of the parent: look at each array for more
    for name in manifest.arrays:
        try:
            reading.read_arrays(cache.path, segment_id, manifest, {name})
        except KetchupError as error:
            found.append(str(error))
    return found


def _family(segment_id: str, manifest: Manifest) -> tuple[int, str, str]:
    """Sort key that puts the children of one parent side by side, so that it is decoded once."""
    info = manifest.info
    parent = coverage.parent_id(info) if isinstance(info, RolloutsInfo | ScoresInfo) else ""
    return KINDS.index(manifest.kind), parent, segment_id


def data_bytes(manifest: Manifest) -> int:
    return sum(file.length for file in manifest.files.values())


def _different(records: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple({repr(record): record for record in records}.values())


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _files(folder: Path) -> set[str]:
    return {str((Path(at) / name).relative_to(folder)) for at, _, names in os.walk(folder) for name in names}


def _share(part: int, whole: int) -> str:
    return f", {part / whole:.1%} finished" if whole else ""


def _step(step: int | None) -> str:
    return "" if step is None else f", step {step:,}"
