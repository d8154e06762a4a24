"""Which scored rollouts of a cache a method learns from: samples of a student, outputs of the teacher."""

from __future__ import annotations

from collections.abc import Callable

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef, original_id
from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.errors import CacheError
from ketchup_cache.provenance import PolicyInfo, TeacherInfo, in_precision

ON_SAMPLES = ("ketchup", "llmr", "reverse-kl", "js", "tvd")
"""Methods that learn from the student's own samples."""
ON_OUTPUTS = ("seqkd", "kl", "js", "tvd")
"""Methods that learn from teacher outputs."""


def student_samples(cache: Cache, config: LearnConfig) -> list[ScoredRef]:
    """Scored rollouts of `config.policy`; without one, of all policies, for js and tvd of all but the teacher's.

    Raises CacheError where there are none.
    """
    selected = cache.scored(config.scored_by, config.policy)
    if config.method in ON_OUTPUTS and config.policy is None:
        selected = [ref for ref in selected if not _is_output(cache, config)(ref)]
    what = f"of policy {config.policy!r}" if config.policy else "of a student"
    return _with_top(cache, config, selected, f"no scored rollouts {what}; make some with `rollout` and `score`")


def teacher_outputs(cache: Cache, config: LearnConfig) -> list[ScoredRef]:
    """Scored rollouts of `config.teacher_outputs`; without it, of the policy that has the teacher's weights.

    Raises CacheError where there are none.
    """
    is_output = _is_output(cache, config)
    name = cache.select_teacher(config.scored_by).name
    return _with_top(
        cache,
        config,
        [ref for ref in cache.scored(config.scored_by) if is_output(ref)],
        f"--method {config.method} learns from teacher outputs, but no scored rollouts are of policy "
        f"{config.teacher_outputs or name}; make them with `ketchup-cache rollout --student {name} --greedy` and "
        "`ketchup-cache score`, or name a policy with --teacher-outputs",
    )


def _is_output(cache: Cache, config: LearnConfig) -> Callable[[ScoredRef], bool]:
    teacher = cache.select_teacher(config.scored_by)
    if config.teacher_outputs is not None:
        chosen = cache.select_policy(config.teacher_outputs, "--teacher-outputs").fingerprint
        return lambda ref: ref.policy.fingerprint == chosen
    return lambda ref: is_teacher(ref.policy, teacher)


def is_teacher(policy: PolicyInfo, teacher: TeacherInfo) -> bool:
    """Whether they have the same weights, whatever the names, and whatever precision the teacher scored in."""
    return in_precision(policy.fingerprint, teacher.dtype) == teacher.fingerprint


def _with_top(cache: Cache, config: LearnConfig, selected: list[ScoredRef], none: str) -> list[ScoredRef]:
    """The selected rows, from segments that keep as many logits as the method needs. All rows must have them."""
    if not selected:
        raise CacheError(f"{cache.address}: {none}")
    if not config.top_needed:
        return selected
    wanted = {_original(cache, ref) for ref in selected}
    scored = cache.scored(config.scored_by, keep_top=config.top_needed)
    enough = [ref for ref in scored if _original(cache, ref) in wanted]
    missing = sum(ref.rows for ref in selected) - sum(ref.rows for ref in enough)
    if missing:
        raise CacheError(
            f"{cache.address}: {missing:,} of the rollouts for --method {config.method} are scored without "
            f"the teacher's {config.top_needed} largest logits (or with fewer); run `ketchup-cache score --teacher "
            f"{selected[0].teacher.name} --cache {cache.address} --keep-top {config.top_needed}`"
        )
    return enough


def _original(cache: Cache, ref: ScoredRef) -> str:
    """The same for the lossless and the compact form of the same rollouts."""
    info = cache.manifest(ref.rollouts_id).info
    assert isinstance(info, RolloutsInfo)
    return original_id(ref.rollouts_id, info)
