import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.errors import MismatchError, NumericsError
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.forward import states_and_next
from ketchup_cache.provenance import TeacherInfo, in_precision
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged
from tests.helpers.errors import refuses
from tests.helpers.models import make_model, make_t5, save_model
from tests.helpers.oracle import assert_same_scores, make_rollouts, plain_scores, random_rollouts
from tests.helpers.scoring import MODELS, TEACHERS, TOKENIZER, teacher_of

CPU = ScoringOptions(device="cpu")

tokens = st.integers(0, 59)
prompt_rows = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4)
completion = st.tuples(st.integers(0, 3), st.lists(tokens, max_size=6), tokens, st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(MODELS)), prompt_rows, st.lists(completion, max_size=8), st.integers(1, 150))
def test_scores_are_those_of_the_plain_pass(version, prompts, rows, budget):
    """Whatever the lengths, the batches, the row order, the token ids; the pad id 0 is a token like any other."""
    prompts = Ragged.from_rows(prompts, np.int32)
    rollouts = make_rollouts(
        [index % len(prompts) for index, _, _, _ in rows],
        [[*body, 1 if finished else last] for _, body, last, finished in rows],
        [finished for _, _, _, finished in rows],
    )
    done = []
    scores = TEACHERS[version].score(prompts, rollouts, batch_tokens=budget, on_batch=done.append)
    assert sum(done) == len(scores.q)
    if rows:
        assert_same_scores(scores, plain_scores(MODELS[version], prompts, rollouts))


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", "qwen2", "gpt2", "mistral-window"])
def test_known_corners(family):
    """A prompt of one token, EOS alone, pad and EOS ids inside, the same prompt and the same rollout twice."""
    prompts = Ragged.from_rows([[1], [0, 0, 1, 0], [5, 0, 6, 1, 9, 9, 9]], np.int32)
    completions = [[1], [7], [0, 0, 0, 1], [0], [3, 1, 4, 1], [3, 1, 4, 1], [8, 9, 10, 11, 12, 13]]
    finished = [True, False, True, False, True, True, False]
    rollouts = make_rollouts([2, 0, 1, 1, 2, 2, 0], completions, finished)
    model = make_model(family)
    scores = teacher_of(model).score(prompts, rollouts, batch_tokens=1000)
    assert_same_scores(scores, plain_scores(model, prompts, rollouts))
    assert (scores.final_max_q == 0).tolist() == finished


@pytest.mark.parametrize("version", MODELS)
def test_shifted_scores_would_be_noticed(version):
    """The comparison above tells a score from its neighbours: they differ by far more than its tolerance."""
    prompts, rollouts = random_rollouts(3, 20)
    scores = plain_scores(MODELS[version], prompts, rollouts)
    for values in (scores.q, scores.max_q, scores.logsumexp, scores.mean_q):
        inner = [np.diff(row) for row in rollouts.completions.with_values(values)]
        assert np.median(np.abs(np.concatenate(inner))) > 0.02


def test_rows_can_be_chosen():
    prompts, rollouts = random_rollouts(4, 10)
    rows = np.array([7, 2, 3])
    plain = plain_scores(MODELS["1.0"], prompts, rollouts)
    wanted = np.concatenate([np.arange(*rollouts.completions.offsets[row : row + 2]) for row in rows])
    scores = TEACHERS["1.0"].score(prompts, rollouts, rows=rows, batch_tokens=60)
    np.testing.assert_allclose(scores.q, plain.q[wanted], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.final_max_q, plain.final_max_q[rows], rtol=1e-4, atol=1e-4)


def test_a_loaded_teacher_is_who_its_files_and_its_precision_say(tmp_path):
    folder, weights = save_model(tmp_path, "1.1"), weights_fingerprint(tmp_path)
    teacher = Teacher.load(str(folder), CPU)
    assert (teacher.info, teacher.tokenizer) == Teacher.identify(str(folder), CPU)
    half, _ = Teacher.identify(str(folder), ScoringOptions(dtype="bfloat16"))
    both = {dtype: in_precision(weights, dtype) for dtype in ("float32", "bfloat16")}
    made = [TeacherInfo(name=str(folder), fingerprint=of, dtype=dtype) for dtype, of in both.items()]
    assert [teacher.info, half] == made
    assert len({weights, *(info.fingerprint for info in made)}) == 3
    assert teacher.tokenizer.fingerprint == TOKENIZER.fingerprint
    prompts, rollouts = random_rollouts(5, 6)
    found = teacher.score(prompts, rollouts, batch_tokens=100)
    assert_same_scores(found, plain_scores(MODELS["1.1"], prompts, rollouts))


def test_a_bfloat16_teacher_scores_in_float32(tmp_path, monkeypatch):
    """On a processor without bfloat16 products all of it: the scores are those of the same weights in float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    teacher = Teacher.load(str(save_model(tmp_path, "1.1", scale=5)), ScoringOptions(dtype="bfloat16", device="cpu"))
    narrow = make_t5("1.1", scale=5).bfloat16()
    prompts, rollouts = random_rollouts(6, 8)
    scores = teacher.score(prompts, rollouts, batch_tokens=100)
    assert_same_scores(scores, plain_scores(make_t5("1.1", scale=5).bfloat16().float(), prompts, rollouts))
    rounded = plain_scores(narrow, prompts, rollouts)  # body and head in bfloat16
    assert np.abs(rounded.max_q - scores.max_q).max() > 0.02


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_none_name_their_row(poison):
    model = make_t5("1.1")
    with torch.no_grad():
        model.shared.weight[40] = poison
    prompts = Ragged.from_rows([[5, 1], [40, 1]], np.int32)
    rollouts = make_rollouts([0, 0, 1], [[7, 1], [8, 1], [9, 1]], [True] * 3)
    teacher = Teacher.__new__(Teacher)  # the probe would meet token 40 first
    vars(teacher).update(vars(TEACHERS["1.1"]), _model=model)
    with pytest.raises(NumericsError, match="rollout row 2: teacher tiny gives NaN or infinite logits; its weights"):
        teacher.score(prompts, rollouts, batch_tokens=1000)
    teacher.info = teacher.info.model_copy(update={"dtype": "bfloat16"})
    refuses(NumericsError, "try --dtype float32", teacher.score, prompts, rollouts, batch_tokens=1000)
    teacher.score(prompts, rollouts, rows=np.array([0, 1]), batch_tokens=1000)


def test_a_state_after_the_end_is_checked_too(monkeypatch):
    def spoiled(model, batch, next_state):
        states, next_states = states_and_next(model, batch, next_state)
        next_states[-1] = float("nan")
        return states, next_states

    monkeypatch.setattr("ketchup_cache.scoring.teacher.states_and_next", spoiled)
    rollouts = make_rollouts([0, 0, 0], [[7, 8], [7, 9], [7, 1]], [False, False, True])
    with pytest.raises(NumericsError, match="rollout row 1"):
        TEACHERS["1.1"].score(Ragged.from_rows([[5, 1]], np.int32), rollouts, batch_tokens=1000)


def test_token_ids_beyond_the_vocabulary_name_their_row():
    teacher = TEACHERS["1.0"]
    prompts = Ragged.from_rows([[99, 1], [60, 1], [5, 1]], np.int32)
    good = make_rollouts([2, 2], [[7, 1], [8]], [True, False])
    assert len(teacher.score(prompts, good, batch_tokens=100).q) == 3  # prompts that no rollout has are not looked at
    with pytest.raises(MismatchError, match="prompt row 1 holds token id 60, but teacher tiny has 60 tokens"):
        teacher.score(prompts, dataclasses.replace(good, prompt_index=np.array([2, 1])), batch_tokens=100)
    bad = make_rollouts([2, 2], [[7, 1], [8, -1]], [True, False])
    with pytest.raises(MismatchError, match="completion of rollout row 1 holds token id -1"):
        teacher.score(prompts, bad, batch_tokens=100)
