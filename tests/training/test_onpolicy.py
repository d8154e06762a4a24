"""Refreshing: rollouts of the current student, scored when they are needed, and runs that survive being killed."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ketchup_cache.scoring.score
import ketchup_cache.training.learn
from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient_step
from tests.helpers.learning import assert_same_weights, json_lines, killed_before, metrics
from tests.helpers.models import WORDS, make_t5, make_tokenizer, save_model, write_prompts
from tests.helpers.oracle import plain_logits, plain_row_scores as plain_scores
from tests.helpers.trust import kill_once

VOCAB = len(WORDS) + 3
LEARN = {
    "--k": 2, "--steps": 9, "--refresh-every": 3, "--batch-size": 8, "--samples": 2, "--max-new-tokens": 6,
    "--unfinished": "bootstrap", "--lr": 1e-3, "--checkpoint-every": 2, "--device": "cpu",
}  # fmt: skip


@pytest.fixture
def words(tmp_path, folders):
    """A cache with prompts and two rollouts, and the words of a `learn` command."""
    write_prompts(tmp_path / "d.jsonl", 30)
    options = {"--teacher": folders[1], "--cache": tmp_path / "cache", "--out": tmp_path / "run"}
    return fill({**LEARN, "--student": folders[0], **options}, tmp_path)


def fill(options, tmp_path):
    """The same options, once their cache holds prompts and two rollouts of the first."""
    rollout = ["rollout", "--student", options["--student"], "--data", tmp_path / "d.jsonl", "--first", 1]
    rollout += ["--cache", options["--cache"], "--samples", 2, "--max-new-tokens", 6]
    assert main([*map(str, rollout)]) == 0
    return options


def flat(options) -> list[str]:
    return ["learn", *(str(part) for pair in options.items() for part in pair)]


def test_every_phase_samples_the_student_as_it_is_then(words, tmp_path, folders):
    """Behaviour log-probabilities and scores of the refreshed rollouts equal plain forward passes of the weights that
    the run had at that step: those of a run that stops there.
    """
    assert main(flat(words)) == 0
    cache = open_cache(tmp_path / "cache")
    refreshed = [m["step"] for m in metrics(tmp_path / "run") if m["refreshed"]]
    assert refreshed == [0, 3, 6]
    for m in metrics(tmp_path / "run"):
        if m["refreshed"]:
            assert m["ratio_mean"] == pytest.approx(1, abs=1e-5)
            assert m["ess"] == pytest.approx(1, abs=1e-6)
            assert m["behavior_kl"] == pytest.approx(0, abs=1e-8)
        else:
            assert m["behavior_kl"] > 1e-7
    infos = [info for _, info in cache.rollouts()]
    ranges = [(-1 if i.policy.step is None else i.policy.step, i.prompt_start, i.prompt_stop) for i in infos]
    # each phase goes on where the last one stopped, 12 prompts; phase 0 is content with what was held of this student
    assert sorted(ranges) == [(-1, 0, 1), (3, 12, 24), (6, 0, 6), (6, 24, 30)]
    # prompts 0 to 6 come again, but not with the random numbers of another phase
    assert len({info.sampling.seed for info in infos}) == 3

    assert main(flat(words | {"--steps": 3, "--out": tmp_path / "short"})) == 0
    at_three = tmp_path / "short" / "last"
    segments = [m for _, m in cache.manifests("rollouts") if m.info.policy.step == 3]
    assert segments
    assert {m.info.policy.fingerprint for m in segments} == {weights_fingerprint(at_three)}
    student = make_t5("1.0")
    student.load_state_dict(load_file(at_three / "model.safetensors"), strict=False)
    student.tie_weights()
    teacher, checked = make_t5("1.1", seed=2), 0
    for row in cache.rows(policy=weights_fingerprint(at_three)):
        own = plain_logits(student, row.prompt_tokens, row.completion_tokens)[:, :VOCAB].log_softmax(1)
        own = own[range(len(row.completion_tokens)), row.completion_tokens.tolist()]
        np.testing.assert_allclose(row.behavior_logprob, own.numpy(), rtol=0, atol=1e-4)
        expected = plain_scores(teacher, row.prompt_tokens, row.completion_tokens, row.finished, VOCAB)
        for name in ("q", "max_q", "logsumexp", "mean_q"):
            np.testing.assert_allclose(getattr(row, name), expected[name], rtol=0, atol=1e-4)
        checked += 1
    assert checked == 24  # 3 steps of 8 rollouts


def test_a_few_rollouts_of_each_refresh_are_written_down(words, tmp_path):
    assert main(flat(words)) == 0
    rows, decode = json_lines(tmp_path / "run" / "samples.jsonl"), make_tokenizer().decode
    assert [row["step"] for row in rows] == [step for step in (0, 3, 6) for _ in range(4)]
    known = {}
    for r in open_cache(tmp_path / "cache").rows():
        one_step = r.q[0] - r.logsumexp[0] - (r.max_q - r.q)[1:].sum()  # Eq. 10, telescoped, less the logsumexp
        known[decode(r.prompt_tokens), decode(r.completion_tokens), r.finished] = one_step
    for row in rows:
        assert row["return"] == pytest.approx(known[row["prompt"], row["completion"], row["finished"]], abs=1e-3)


def test_rollouts_may_be_used_several_times(words, tmp_path, monkeypatch):
    """A third of the rollouts, each in three steps of its phase, in batches of other companions."""
    batches = []

    def watched(learner, batch, step, *more):
        rows = zip(batch.rollouts.prompt_index, batch.rollouts.completions, strict=True)
        batches.append([(batch.prompts.tokens[index].tobytes(), row.tobytes()) for index, row in rows])
        return policy_gradient_step(learner, batch, step, *more)

    monkeypatch.setattr(ketchup_cache.training.learn, "policy_gradient_step", watched)
    assert main(flat(words | {"--refresh-every": 6, "--steps": 18, "--reuse": 3})) == 0
    cache = open_cache(tmp_path / "cache")
    assert [m["step"] for m in metrics(tmp_path / "run") if m["refreshed"]] == [0, 6, 12]
    for step, phase in ((6, batches[6:12]), (12, batches[12:18])):
        segments = [m for _, m in cache.manifests("rollouts") if m.info.policy.step == step]
        assert sum(m.rows for m in segments) == 16  # of 6 batches of 8
        rounds = [phase[0] + phase[1], phase[2] + phase[3], phase[4] + phase[5]]
        assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2])
        assert rounds[0] != rounds[1] != rounds[2]
    later = [m["behavior_kl"] for m in metrics(tmp_path / "run")[7:12]]
    assert min(later) > 1e-7  # and the ratio corrects for it


def test_rollouts_are_refreshed_once_they_count_for_too_few(words, tmp_path, monkeypatch):
    """After each step under the bound, and after N steps at the latest; also in a run that is killed in between."""
    given = words | {"--refresh-every": 5, "--steps": 16, "--lr": 3e-3}
    assert main(flat(given | {"--out": tmp_path / "plain"})) == 0
    bound = sorted(m["ess"] for m in metrics(tmp_path / "plain"))[5]
    given |= {"--refresh-below-ess": bound, "--out": tmp_path / "whole", "--cache": tmp_path / "whole-cache"}
    assert main(flat(fill(given, tmp_path))) == 0
    lines, since = metrics(tmp_path / "whole"), 0
    for before, m in pairwise(lines):
        due = before["ess"] < bound or m["step"] - since == 5
        assert m["refreshed"] == due
        since = m["step"] if due else since
    early = [m["step"] for m in lines if m["refreshed"]]
    assert len(early) < 16
    assert early != [0, 5, 10, 15]

    given |= {"--out": tmp_path / "killed", "--cache": tmp_path / "killed-cache"}
    with killed_before(early[2]):
        main(flat(fill(given, tmp_path)))
    assert main(flat(given)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_an_epoch_over_the_prompts_has_a_step_for_each_use(words, tmp_path):
    assert main(flat(words | {"--steps": 0, "--reuse": 3})) == 0
    assert len(metrics(tmp_path / "run")) == 22  # 30 prompts x 2 samples x 3 uses, in batches of 8


def test_prompts_that_were_stored_twice_count_once(words, tmp_path):
    """As two processes do that start at the same moment."""
    cache = open_cache(tmp_path / "cache")
    ((id_, manifest),) = cache.manifests("prompts")
    assert cache.commit_prompts(cache.load_prompts(id_), manifest.info) != id_
    assert main(flat(words)) == 0
    segments = open_cache(tmp_path / "cache").rollouts()
    assert {info.prompts for _, info in segments} == {id_}
    assert sum(info.prompt_stop - info.prompt_start for _, info in segments) == 1 + 12 + 12


@pytest.mark.parametrize(("small", "loads"), [(0.0, 3), (1.0, 1)])
def test_teacher_is_in_memory_only_while_it_scores_unless_it_is_small(words, monkeypatch, small, loads):
    """At every optimizer step, no module that a large teacher was loaded with is alive. A small one is read once."""
    original, alive, loaded = Optimizer.step, [], []
    load = ketchup_cache.scoring.score.Teacher.load

    def remembering(*arguments, **options):
        before = {id(o) for o in gc.get_objects()}
        teacher = load(*arguments, **options)
        new = [o for o in gc.get_objects() if id(o) not in before and isinstance(o, torch.nn.Module)]
        assert any("Gated" in type(o).__name__ for o in new)
        loaded.append([weakref.ref(o) for o in new])
        return teacher

    def step(self, number):
        gc.collect()
        alive.append(sum(ref() is not None for modules in loaded for ref in modules))
        return original(self, number)

    monkeypatch.setattr(Optimizer, "step", step)
    monkeypatch.setattr(ketchup_cache.scoring.score.Teacher, "load", remembering)
    monkeypatch.setattr(ketchup_cache.scoring.teacher, "SMALL", small)
    gc.collect()
    gc.freeze()  # what earlier tests left is not looked through at every step
    try:
        assert main(flat(words)) == 0
    finally:
        gc.unfreeze()
    assert len(loaded) == loads
    assert alive == [0] * 9 if loads == 3 else min(alive) > 0


def test_killed_at_any_moment_it_ends_with_the_same_bits(words, tmp_path):
    """kill -9 again and again, while sampling, scoring or training; each run goes on; the end is the same."""
    options = words | {"--out": tmp_path / "undisturbed", "--cache": tmp_path / "other"}
    assert main(flat(fill(options, tmp_path))) == 0
    rng, kills = np.random.default_rng(0), 0
    for _ in range(4):
        before = _progress(tmp_path)
        # it gets somewhere new first, so that attempts make headway whatever the machine's speed
        kills += kill_once(
            lambda: main(flat(words)), lambda before=before: _progress(tmp_path) != before, rng.uniform(0, 0.3)
        )
    assert main(flat(words)) == 0
    assert kills >= 2
    assert_same_weights(tmp_path / "undisturbed", tmp_path / "run")
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(9))
    undisturbed, killed = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("undisturbed", "run"))
    assert undisturbed == killed
    assert main(["verify", str(tmp_path / "cache")]) == 0


def _progress(tmp_path) -> tuple:
    checkpoints = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-????????"))
    return (*checkpoints, len(list((tmp_path / "cache" / "manifests").iterdir())))


def test_teacher_of_another_tokenizer_is_refused(words, tmp_path, capsys):
    other = save_model(tmp_path / "other", "1.1", seed=2)
    make_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(other)
    assert main(flat(words | {"--teacher": other})) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "encodes differently: id 3 is 'a' in one and 'the' in the other" in error


def test_weak_student_is_told_what_to_do(words, capsys):
    assert main(flat(words | {"--unfinished": "drop"})) == 2
    assert "use --unfinished bootstrap" in capsys.readouterr().err
    # nothing was trained, so the folder is free for other options
    assert main(flat(words)) == 0
