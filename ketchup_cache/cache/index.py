"""Which rollouts have scores, by which teacher: worked out from the manifests alone, without reading data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ketchup_cache.cache.manifest import Manifest, RolloutsInfo, ScoresInfo
from ketchup_cache.errors import CacheError, MismatchError
from ketchup_cache.provenance import PolicyInfo, TeacherInfo

Child = RolloutsInfo | ScoresInfo
Model = TypeVar("Model", PolicyInfo, TeacherInfo)


@dataclass(frozen=True)
class ScoredRef:
    """Rows row_start to row_stop of a rollouts segment, whose scores are in one scores segment."""

    scores_id: str
    rollouts_id: str
    prompts_id: str
    row_start: int
    row_stop: int
    samples: int
    """Completions per prompt."""
    policy: PolicyInfo
    teacher: TeacherInfo
    keep_top: int = 0
    """Largest logits kept of each state."""

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start


def scored(
    manifests: Mapping[str, Manifest], teacher: str | None = None, policy: str | None = None, keep_top: int = 0
) -> list[ScoredRef]:
    """Every scored row once, in the order of commits: where two scorers did the same rows, the first one's scores.

    manifests: all of a cache, in the order of commits. teacher, policy: fingerprints; None for any. keep_top: only
    scores with so many of the largest logits; a vocabulary has at most all of its own.
    Raises CacheError where a parent is missing, MismatchError where its tokenizer is another.
    """
    done: dict[tuple[str, str], list[tuple[int, int]]] = {}
    refs = []
    for scores_id, manifest in manifests.items():
        info = manifest.info
        if not isinstance(info, ScoresInfo) or teacher not in (None, info.teacher.fingerprint):
            continue
        if info.keep_top < min(keep_top, info.tokenizer.vocab_size):
            continue
        parent = check_parent(info, manifests.get(info.rollouts), scores_id).info
        assert isinstance(parent, RolloutsInfo)
        if policy not in (None, parent.policy.fingerprint):
            continue
        covered = done.setdefault((original_id(info.rollouts, parent), info.teacher.fingerprint), [])
        for start, stop in gaps(info.row_start, info.row_stop, covered):
            covered.append((start, stop))
            samples, by = parent.sampling.samples, parent.policy
            refs.append(
                ScoredRef(
                    scores_id,
                    info.rollouts,
                    parent.prompts,
                    start,
                    stop,
                    samples,
                    by,
                    info.teacher,
                    info.keep_top,
                )
            )
    return refs


def original_id(rollouts_id: str, info: RolloutsInfo) -> str:
    """What stands for the rows of a rollouts segment, be they stored lossless or compact."""
    return info.original or rollouts_id


def rollouts(manifests: Mapping[str, Manifest]) -> list[tuple[str, RolloutsInfo]]:
    """(id, info) of the rollouts segments, in the order of commits; of a lossless and a compact one, the lossless."""
    found = [(id_, m.info) for id_, m in manifests.items() if isinstance(m.info, RolloutsInfo)]
    chosen: dict[str, str] = {}
    for id_, info in found:
        original = original_id(id_, info)
        chosen[original] = original if original in manifests else chosen.get(original, id_)
    return [(id_, info) for id_, info in found if chosen[original_id(id_, info)] == id_]


def unscored(manifests: Mapping[str, Manifest], teacher: str, keep_top: int = 0) -> list[tuple[str, int, int]]:
    """(rollouts id, row_start, row_stop) of all rows without scores by the teacher with this fingerprint, or with
    fewer than `keep_top` of the largest logits."""
    covered: dict[str, list[tuple[int, int]]] = {}
    for ref in scored(manifests, teacher, keep_top=keep_top):
        parent = manifests[ref.rollouts_id].info
        assert isinstance(parent, RolloutsInfo)
        covered.setdefault(original_id(ref.rollouts_id, parent), []).append((ref.row_start, ref.row_stop))
    return [
        (rollouts_id, start, stop)
        for rollouts_id, info in rollouts(manifests)
        for start, stop in gaps(0, manifests[rollouts_id].rows, covered.get(original_id(rollouts_id, info), []))
    ]


def gaps(start: int, stop: int, covered: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of start..stop that no covered range touches."""
    left = []
    for begin, end in sorted(covered):
        if start < min(begin, stop):
            left.append((start, min(begin, stop)))
        start = max(start, end)
    return [*left, (start, stop)] if start < stop else left


def parent_id(info: Child) -> str:
    """Id of the segment that one was made from."""
    return info.rollouts if isinstance(info, ScoresInfo) else info.prompts


def check_parent(info: Child, parent: Manifest | None, segment_id: str = "") -> Manifest:
    """The parent's manifest, once it is known to fit. `segment_id` is empty for a segment still to be committed.

    Raises CacheError where it is missing, of the wrong kind or too short; MismatchError where its tokenizer is another.
    """
    if isinstance(info, ScoresInfo):
        kind, start, stop = "rollouts", info.row_start, info.row_stop
    else:
        kind, start, stop = "prompts", info.prompt_start, info.prompt_stop
    what, parent_name = f"{info.kind} {segment_id[:12] or '(new)'}", f"{kind} {parent_id(info)[:12]}"
    if parent is None:
        raise CacheError(f"{what} needs {parent_name}, which is not in this cache; copy that segment too")
    if parent.kind != kind:
        raise CacheError(f"{what} needs {parent_name}, but that is a segment of {parent.kind}")
    if not start <= stop <= parent.rows:
        raise CacheError(f"{what} covers rows {start} to {stop} of {parent_name}, which has {parent.rows}")
    mine, other = info.tokenizer, parent.info.tokenizer
    if (mine.fingerprint, mine.vocab_size) != (other.fingerprint, other.vocab_size):
        raise MismatchError(
            f"{what} was made with tokenizer {mine.name}, {parent_name} with {other.name}, "
            f"which encodes differently; use the same tokenizer"
        )
    return parent


def distinct(found: Iterable[Model]) -> list[Model]:
    """Each fingerprint once, where it came first."""
    first: dict[str, Model] = {}
    for model in found:
        first.setdefault(model.fingerprint, model)
    return list(first.values())


def select(what: str, option: str, selector: str | None, found: list[Model]) -> Model:
    """The one model with this name, or whose fingerprint starts so; the only one where the selector is None.

    Raises CacheError where there is none or more than one.
    """
    named = [model for model in found if selector in (None, model.name)]
    chosen = distinct(named or [model for model in found if model.fingerprint.startswith(str(selector))])
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise CacheError(f"no {what} `{selector}` in this cache; it has {_listed(distinct(found))}")
    which = "the cache has" if selector is None else f"`{selector}` is"
    raise CacheError(
        f"{which} more than one {what}: {_listed(chosen)}; choose one with {option} and the start of its fingerprint"
    )


def _listed(models: list[Model], most: int = 6) -> str:
    shown = ", ".join(f"{model.name} ({model.fingerprint[:12]})" for model in models[:most])
    return f"{shown} and {len(models) - most} more" if len(models) > most else shown
