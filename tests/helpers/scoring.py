"""What the tests of scoring share: tiny teachers, and caches of rollouts whose scores are compared with plain ones."""

from pathlib import Path

import numpy as np

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo, TokenizerInfo
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Prompts, Ragged, Rollouts
from tests.helpers.models import make_t5, make_tokenizer
from tests.helpers.oracle import assert_same_scores, plain_scores

TOKENIZER = tokenizer_info(make_tokenizer(), "tiny")


def teacher_of(model) -> Teacher:
    return Teacher(model, TeacherInfo(name="tiny", fingerprint="0" * 64, dtype="float32"), TOKENIZER)


MODELS = {version: make_t5(version) for version in ("1.0", "1.1")}
TEACHERS = {version: teacher_of(model) for version, model in MODELS.items()}


def add_rollouts(cache: Cache, prompts: Ragged, rollouts: Rollouts, *, policy: int = 0, tokenizer=None, name="student"):
    info = tokenizer if isinstance(tokenizer, TokenizerInfo) else tokenizer_info(tokenizer or make_tokenizer(), name)
    ids = np.random.default_rng(0).integers(0, 256, (len(prompts), 16)).astype(np.uint8)
    data = DataInfo(name="made up", fingerprint="d" * 64, template="{prompt}")
    prompts_id = cache.commit_prompts(Prompts(ids, prompts), PromptsInfo(tokenizer=info, data=data, start=0))
    made_by = {"policy": PolicyInfo(name="student", fingerprint=f"{policy:064x}"), "sampling": Sampling()}
    made_by |= {"prompts": prompts_id, "prompt_start": 0, "prompt_stop": len(prompts), "tokenizer": info}
    return cache.commit_rollouts(rollouts, RolloutsInfo(**made_by))


def options(cache: Cache, teacher: Path, **more) -> ScoreConfig:
    return ScoreConfig(**({"teacher": str(teacher), "cache": cache.path, "device": "cpu", "batch_tokens": 64} | more))


def assert_scored(cache: Cache, teacher: Path, ids) -> None:
    """Every row of these rollouts has exactly the plain scores of a T5 "1.1"."""
    fingerprint = Teacher.identify(str(teacher), ScoringOptions())[0].fingerprint
    done = {}
    cache.refresh()
    for ref in cache.scored(fingerprint):
        part = cache.load_scored(ref)
        assert_same_scores(part.scores, plain_scores(MODELS["1.1"], part.prompts.tokens, part.rollouts))
        done.setdefault(ref.rollouts_id, []).extend(range(ref.row_start, ref.row_stop))
    assert done == {i: list(range(cache.manifest(i).rows)) for i in ids}


def segments(cache: Cache):
    """The segments of scores that are in the cache by now."""
    return open_cache(cache.path).manifests("scores")
