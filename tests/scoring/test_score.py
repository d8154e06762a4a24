import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.errors import CacheError, KetchupError, MismatchError, NumericsError
from ketchup_cache.models import fingerprint
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.provenance import TokenizerInfo
from ketchup_cache.scoring.score import Scorer, follow, score
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged
from tests.helpers.errors import refuses
from tests.helpers.models import WORDS, make_tokenizer, save_model
from tests.helpers.oracle import assert_same_scores, make_rollouts, plain_scores, random_rollouts
from tests.helpers.scoring import MODELS, add_rollouts, assert_scored, options, segments


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), "1.1")


def test_scoring_a_cache_and_scoring_it_again(cache, teacher, monkeypatch):
    ids = [add_rollouts(cache, *random_rollouts(seed, 20, prompts=8), policy=seed) for seed in range(2)]
    report = score(options(cache, teacher, commit_tokens=25))
    assert_scored(cache, teacher, ids)
    tokens = sum(cache.manifest(i).tokens for i in ids)
    assert report.computed + report.copied == 40
    assert report.tokens <= tokens
    assert report.segments == len(segments(cache)) > 4
    assert all(manifest.tokens <= 25 for _, manifest in segments(cache))
    assert f"scored {report.computed} rollouts ({report.tokens} tokens" in str(report)

    monkeypatch.setattr(Teacher, "load", None)  # weights are not needed again
    again = score(options(cache, teacher))
    assert (again.already, again.computed, again.copied, again.segments) == (40, 0, 0, 0)
    assert str(again).startswith(f"nothing to do: all 40 rollouts are scored by teacher {teacher} (")


def test_only_the_segments_that_are_asked_for(cache, teacher):
    first, second = (add_rollouts(cache, *random_rollouts(seed, 6), policy=seed) for seed in range(2))
    scorer = Scorer(options(cache, teacher))
    scorer.ensure(cache, [second])
    assert_scored(cache, teacher, [second])
    assert scorer.ensure(cache, [second]).already == 6
    assert scorer.ensure(cache).already == 6
    assert_scored(cache, teacher, [first, second])
    refuses(CacheError, "has no segment", scorer.ensure, cache, ["f" * 64])


def test_the_same_rollout_is_computed_once(cache, teacher):
    """Twice in one segment, under another policy, and in another run; but not where the cut or the prompt differs."""
    prompts = Ragged.from_rows([[5, 1], [5, 6, 1]], np.int32)
    rollouts = make_rollouts([0, 0, 1, 0], [[7, 1], [7, 1], [7, 1], [7, 8]], [True, True, True, False])
    first = add_rollouts(cache, prompts, rollouts)
    report = score(options(cache, teacher))
    assert (report.computed, report.copied, report.tokens, report.hit_rate) == (3, 1, 6, 0.25)

    # other places for the same prompts; [7, 8] is new as a prefix, [5 6 | 1 7 1] is not [5 6 1 | 7 1]
    prompts = Ragged.from_rows([[9, 1], [5, 6, 1], [5, 1], [5, 6]], np.int32)
    rollouts = make_rollouts([2, 1, 2, 3], [[7, 1], [7, 1], [7, 8], [1, 7, 1]], [True, True, False, True])
    second = add_rollouts(cache, prompts, rollouts, policy=1)
    report = score(options(cache, teacher, commit_tokens=2))
    assert (report.computed, report.copied, report.tokens) == (1, 3, 3)
    assert_scored(cache, teacher, [first, second])

    # the same tokens, finished or cut: only the cut one has a value after its end
    third = add_rollouts(cache, prompts, make_rollouts([1, 1], [[7, 1], [7, 1]], [True, False]), policy=2)
    report = score(options(cache, teacher))
    assert (report.computed, report.copied) == (1, 1)
    assert_scored(cache, teacher, [first, second, third])


@pytest.mark.parametrize("keep_top", [0, 3])
def test_scores_in_float16_say_so_and_are_never_copied_as_float32(cache, teacher, keep_top):
    prompts, rollouts = random_rollouts(0, 5)
    add_rollouts(cache, prompts, rollouts)
    more = {"storage": "float16", "keep_top": keep_top}
    assert score(options(cache, teacher, **more)).computed > 0
    ((id_, manifest),) = segments(cache)
    assert (manifest.info.storage, open_cache(cache.path).manifest(id_).arrays["q"].dtype) == ("compact", "float16")
    cache.refresh()
    assert verify(cache, deep=True).ok
    assert_same_scores(cache.load_scores(id_), plain_scores(MODELS["1.1"], prompts, rollouts), 1e-2)
    second = add_rollouts(cache, prompts, rollouts, policy=1)
    assert score(options(cache, teacher, keep_top=keep_top)).computed > 0
    ((part, _),) = [(i, m) for i, m in segments(cache) if m.info.rollouts == second]
    cache.refresh()
    assert_same_scores(cache.load_scores(part), plain_scores(MODELS["1.1"], prompts, rollouts))
    add_rollouts(cache, prompts, rollouts, policy=2)
    assert score(options(cache, teacher, **more)).computed == 0


def test_another_teacher_or_precision_scores_anew(cache, teacher, tmp_path):
    add_rollouts(cache, *random_rollouts(0, 5))
    other = save_model(tmp_path / "other", "1.1", seed=1)
    asked = (options(cache, teacher), options(cache, other), options(cache, teacher, dtype="bfloat16"))
    reports = [score(one) for one in asked]
    assert [report.copied + report.already for report in reports] == [5 - report.computed for report in reports]
    assert all(report.computed for report in reports)
    assert len(open_cache(cache.path).teachers()) == 3


def test_another_tokenizer_is_refused_before_weights_are_loaded(cache, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "load", None)
    report = score(options(cache, teacher))  # nothing there yet
    assert (report.already, report.segments, report.hit_rate) == (0, 0, 0.0)
    theirs = make_tokenizer([*WORDS[:4], "hound", *WORDS[5:]])
    theirs.save_pretrained(tmp_path / "student")
    add_rollouts(cache, *random_rollouts(0, 5), tokenizer=theirs, name=str(tmp_path / "student"))
    refused = refuses(MismatchError, ".", score, options(cache, teacher))
    message = refused
    assert message.endswith("`pretrain --model STUDENT --data texts.jsonl --target-field output`")
    assert f"tokenizer {tmp_path / 'student'} wrote them, but that of teacher {teacher} encodes differently" in message
    assert f"id 7 is {WORDS[4]!r} in one and 'hound' in the other" in message
    assert "\n" not in message
    assert not segments(cache)
    shutil.rmtree(tmp_path / "student")
    refuses(MismatchError, r"student wrote them, .* encodes differently; a teacher", score, options(cache, teacher))


@pytest.mark.parametrize("pad", [None, "</s>", "<pad>"])
@pytest.mark.parametrize("earlier", [False, True])
def test_another_pad_token_is_the_same_tokenizer(pad, earlier, cache, teacher):
    """earlier: the cache is of a version whose fingerprints of tokenizers held the ids of <pad> and <unk>."""
    (theirs := make_tokenizer()).pad_token = pad
    info = tokenizer_info(theirs, "student")
    if earlier:
        special = [theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id]
        ids = theirs(fingerprint._probe_texts(theirs), add_special_tokens=True)["input_ids"]
        parts = {"vocabulary": sorted(theirs.get_vocab().items()), "special": special, "ids": ids}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        assert digest != info.fingerprint
        info = TokenizerInfo(name="student", fingerprint=digest, vocab_size=60)
    rollouts_id = add_rollouts(cache, *random_rollouts(0, 5), tokenizer=info)
    score(options(cache, teacher))
    assert_scored(cache, teacher, [rollouts_id])
    assert verify(open_cache(cache.path)).ok


def test_a_bad_number_names_its_rollouts_and_keeps_what_was_done(cache, teacher, monkeypatch):
    rollouts_id = add_rollouts(cache, *random_rollouts(0, 9))
    score_batch, calls = Teacher._score_batch, []

    def fail_later(self, batch, finished, names, keep_top):
        calls.append(names)
        if len(calls) > 3:
            raise NumericsError(f"rollout row {names[0]}: no number")
        return score_batch(self, batch, finished, names, keep_top)

    monkeypatch.setattr(Teacher, "_score_batch", fail_later)
    with pytest.raises(NumericsError, match=f"rollouts {rollouts_id[:12]}: rollout row [0-9]: no number"):
        score(options(cache, teacher, commit_tokens=1))
    assert len(segments(cache)) == 3
    monkeypatch.undo()
    assert score(options(cache, teacher)).already == 3
    assert_scored(cache, teacher, [rollouts_id])


@pytest.mark.parametrize("wrong", ["cache", "teacher"])
def test_what_is_missing_is_named(wrong, cache, teacher, tmp_path):
    config = options(cache, teacher).model_copy(update={wrong: str(tmp_path / "nowhere")})
    refuses(KetchupError, r"nowhere: no", score, config)


KILLED = """
import sys, time
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.scoring import score, teacher
score_batch = teacher.Teacher._score_batch
teacher.Teacher._score_batch = lambda *given: time.sleep(0.2) or score_batch(*given)
score.score(ScoreConfig(teacher=sys.argv[1], cache=sys.argv[2], device="cpu", batch_tokens=64, commit_tokens=10))
"""


def test_a_killed_run_is_finished_by_the_next_and_no_row_is_scored_twice(cache, teacher):
    rollouts_id = add_rollouts(cache, *random_rollouts(1, 60, prompts=30))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(teacher), str(cache.path)], start_new_session=True)
    while not segments(cache):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = sum(manifest.rows for _, manifest in segments(cache))
    assert 0 < before < 60
    report = score(options(cache, teacher))
    assert report.already == before
    assert report.already + report.computed + report.copied == 60
    assert sum(manifest.rows for _, manifest in segments(cache)) == 60
    assert_scored(cache, teacher, [rollouts_id])


def test_ranges_to_commit_are_contiguous_and_bounded():
    completions = Ragged.from_rows([[0] * n for n in (3, 4, 9, 0, 1, 2, 5)], np.int32)
    ranges = list(completions.ranges(0, 7, 7))
    assert ranges == [range(2), range(2, 3), range(3, 6), range(6, 7)]
    assert list(completions.ranges(1, 3, 100)) == [range(1, 3)]
    assert list(completions.ranges(2, 2, 7)) == []


# -------------------------------------------------------------------------------------------------- score --follow


def following(cache, teacher, **more):
    """`score --follow` on its own handle of the cache, until everything was scored for a moment."""
    config = options(cache, teacher, follow=True, poll=0.01, **{"until_idle": 0.3, **more})
    return follow(open_cache(cache.path), Scorer(config))


def test_following_scores_what_appears_and_loads_the_teacher_once(cache, teacher, monkeypatch):
    load, loaded, ids = Teacher.load, [], []
    monkeypatch.setattr(Teacher, "load", lambda *given: loaded.append(1) or load(*given))
    sleep = time.sleep

    def adding(seconds):  # at each pause that is one, more rollouts, of the same and of other text
        if seconds and len(ids) < 4:
            ids.append(add_rollouts(cache, *random_rollouts(len(ids) // 2, 6), policy=len(ids)))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", adding)
    report = following(cache, teacher, until_idle=1)  # a commit may take long on a busy disk
    assert (report.computed + report.copied, report.segments, len(loaded)) == (24, 4, 1)
    assert report.copied >= 12
    assert_scored(cache, teacher, ids)


def test_following_passes_over_what_it_can_not_score_and_says_so_once(cache, teacher, capsys):
    damaged, good = (add_rollouts(cache, *random_rollouts(seed, 6), policy=seed) for seed in range(2))
    theirs = make_tokenizer([*WORDS[1:], WORDS[0]])
    foreign = add_rollouts(cache, *random_rollouts(2, 3), policy=2, tokenizer=theirs, name="\x1b[2J")
    archive = cache.path / "segments" / damaged / "arrays.zip"
    archive.write_bytes(b"x" * archive.stat().st_size)
    assert following(cache, teacher).segments == 1
    assert_scored(cache, teacher, [good])
    lines = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(lines) == 2
    assert any(damaged[:12] in line for line in lines)
    assert any(foreign[:12] in line and "\x1b" not in line for line in lines)


def test_following_outlives_an_outage_with_growing_pauses(cache, teacher, monkeypatch, capsys):
    rollouts_id, failures, pauses = add_rollouts(cache, *random_rollouts(0, 6)), [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    refresh = Cache.refresh

    def failing(self):
        if len(failures) < 4:
            failures.append(1)
            raise CacheError("cut off")
        refresh(self)

    monkeypatch.setattr(Cache, "refresh", failing)
    assert following(cache, teacher, until_idle=0.05).segments == 1
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
    assert capsys.readouterr().err.count("cut off; trying again in") == 4
    assert_scored(cache, teacher, [rollouts_id])


def test_ctrl_c_ends_following_with_a_report(cache, teacher, monkeypatch):
    add_rollouts(cache, *random_rollouts(0, 6))
    monkeypatch.setattr(Teacher, "score", lambda *given, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    assert following(cache, teacher, until_idle=0).segments == 0
