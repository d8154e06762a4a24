"""The rollout driver: every prompt gets its rollouts once, whatever happens in between."""

import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import RolloutConfig
from ketchup_cache.errors import DataError, MismatchError, ModelError
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.provenance import PolicyInfo, Sampling
from ketchup_cache.rollouts import rollout as rollout_module
from ketchup_cache.rollouts.rollout import ensure_rollouts, rollout
from ketchup_cache.text.read import read_examples
from tests.helpers.models import WORDS, make_t5, make_tokenizer, save_model, write_prompts
from tests.helpers.oracle import plain_logits, rows_of
from tests.helpers.segments import exit_code, in_child

LONG = '{"prompt": "the cat sees a dog"}\n'
SMALL = {"ROLLOUTS_AT_ONCE": 4, "TOKENS_PER_SEGMENT": 50, "PROMPTS_PER_SEGMENT": 10, "PROMPT_TOKENS_PER_SEGMENT": 60}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(rollout_module, name, value)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("student"), "1.1", scale=1.0)


def make_config(folder: Path, student: Path, /, *, prompts: int = 4, **changes: object) -> RolloutConfig:
    """Of the prompts in `folder`, which are made where none are there."""
    if not (data := folder / "prompts.jsonl").exists():
        write_prompts(data, prompts)
    where = {"student": str(student), "cache": folder / "cache", "data": str(data), "device": "cpu"}
    return RolloutConfig(**(where | {"samples": 2, "max_new_tokens": 6, "rollout_batch": 4} | changes))


def rollouts_in(cache: Cache):
    """(rollouts, the prompts they index, manifest) of every segment."""
    for id_, manifest in cache.manifests("rollouts"):
        yield cache.load_rollouts(id_), cache.load_prompts(manifest.info.prompts), manifest


def contents(cache: Cache) -> dict[bytes, list[tuple[list[int], bytes]]]:
    """(completion, log-probabilities) of every prompt, which no second segment has sampled."""
    found: dict[bytes, list[tuple[list[int], bytes]]] = {}
    for rollouts, prompts, _ in rollouts_in(cache):
        rows = [(prompts.ids[p].tobytes(), tokens, logprob.tobytes()) for p, tokens, logprob in rows_of(rollouts)]
        assert not found.keys() & {prompt for prompt, *_ in rows}
        for prompt, *row in rows:
            found.setdefault(prompt, []).append(tuple(row))
    return found


def completions(folder: Path) -> dict[bytes, list[list[int]]]:
    return {prompt: [tokens for tokens, _ in rows] for prompt, rows in contents(open_cache(folder)).items()}


def spans(cache: Cache) -> list[tuple[int, int]]:
    return [(info.prompt_start, info.prompt_stop) for _, info in cache.rollouts()]


def ids_in(cache: Cache) -> set[str]:
    return {id_ for id_, _ in cache.manifests()}


def test_every_prompt_gets_its_samples(tmp_path, student):
    config = make_config(tmp_path, student, prompts=23)
    report = rollout(config)
    cache = open_cache(config.cache)
    texts = [json.loads(line)["prompt"] for line in Path(config.data).read_text().splitlines()]

    segments = cache.manifests("prompts")
    assert [m.info.start for _, m in segments] == list(np.cumsum([0, *(m.rows for _, m in segments)])[:-1])
    assert max(m.rows for _, m in segments) <= 10
    assert max(m.tokens for _, m in segments) <= 60
    assert sum(m.rows for _, m in segments) == 23
    expected = [make_tokenizer()(text)["input_ids"] for text in texts]
    assert [row.tolist() for id_, _ in segments for row in cache.load_prompts(id_).tokens] == expected

    for rollouts, prompts, manifest in rollouts_in(cache):
        info = manifest.info
        assert manifest.tokens >= 50 or info.prompt_stop == len(prompts)
        assert rollouts.completions.lengths[:-4].sum() < 50  # committed as soon as there are enough
        assert info.policy == PolicyInfo(name=str(student), fingerprint=weights_fingerprint(student))
        assert info.sampling == Sampling(samples=2, max_new_tokens=6)
    rows = completions(config.cache)
    assert {example.id for example in read_examples(config)} == rows.keys()
    assert {len(of_prompt) for of_prompt in rows.values()} == {2}
    lengths, ends = zip(*((len(row), row[-1] == 1) for of_prompt in rows.values() for row in of_prompt), strict=True)
    assert (report.prompts, report.rollouts, report.tokens, report.finished) == (23, 46, sum(lengths), sum(ends))
    assert (report.duplicates, report.too_long, report.already_there) == (0, 0, 0)


@pytest.mark.parametrize("how", [{"temperature": 0.8}, {"greedy": True, "samples": 1}], ids=str)
def test_what_is_in_the_cache_is_of_the_student(tmp_path, student, how):
    rollout(make_config(tmp_path, student, prompts=6, **how))
    for rollouts, prompts, _ in rollouts_in(open_cache(tmp_path / "cache")):
        for prompt, completion, logprob in rows_of(rollouts):
            logits = plain_logits(make_t5("1.1"), prompts.tokens[prompt], completion)
            plain = (logits / how.get("temperature", 1)).log_softmax(-1)[range(len(completion)), completion].numpy()
            if "greedy" in how:
                assert (completion, logprob.any()) == (logits.argmax(1).tolist(), False)
            else:
                assert logprob == pytest.approx(plain, abs=1e-4)


def test_seeds_follow_the_place_in_the_data(tmp_path, student, monkeypatch):
    """Not the place in a segment: the first prompts of every segment would share theirs."""
    spy = Mock(wraps=rollout_module.sample_completions)
    monkeypatch.setattr(rollout_module, "sample_completions", spy)
    rollout(make_config(tmp_path, student, prompts=23))
    segments = open_cache(tmp_path / "cache").manifests("prompts")
    assert len(segments) > 2
    places = [call.kwargs["first_prompt"] for call in spy.call_args_list]
    assert places == [m.info.start + place for _, m in segments for place in range(0, m.rows, 2)]


def test_nothing_is_done_twice(tmp_path, student, monkeypatch):
    """After running out of memory, a smaller batch goes on where the larger one was killed; a folder under another name
    is the same policy."""
    first = rollout(make_config(tmp_path, student, prompts=12))
    ids = ids_in(open_cache(tmp_path / "cache"))
    monkeypatch.setattr(rollout_module, "load_model", None)  # not even the model is loaded
    monkeypatch.chdir(student.parent)
    for config in (make_config(tmp_path, student, rollout_batch=2), make_config(tmp_path, Path(student.name))):
        again = rollout(config)
        assert ids_in(open_cache(tmp_path / "cache")) == ids
        assert (again.rollouts, again.tokens, again.finished) == (first.rollouts, first.tokens, first.finished)
        assert (first.already_there, again.already_there) == (0, 24)
        assert "24 of them already there" in str(again)


def test_a_cache_at_an_address_is_gone_on_with(tmp_path, student, monkeypatch):
    monkeypatch.setenv("KETCHUP_CACHE_HOME", str(tmp_path / "home"))
    config = make_config(tmp_path, student, cache=f"memory://{tmp_path.name}/cache")
    first, again = rollout(config), rollout(config)
    assert (first.already_there, again.already_there) == (0, first.rollouts)


def test_other_settings_other_rollouts_same_prompts(tmp_path, student):
    for i, changes in enumerate(({}, {"seed": 1}, {"temperature": 0.5}, {"samples": 3}, {"max_new_tokens": 5})):
        assert rollout(make_config(tmp_path, student, **changes)).already_there == 0
        cache = open_cache(tmp_path / "cache")
        assert len({m.info.sampling for _, m in cache.manifests("rollouts")}) == i + 1
    other = save_model(tmp_path / "other", "1.1", seed=1)
    assert rollout(make_config(tmp_path, other)).already_there == 0
    assert len(open_cache(tmp_path / "cache").policies()) == 2
    assert sum(m.rows for _, m in open_cache(tmp_path / "cache").manifests("prompts")) == 4


def test_prompts_cut_at_another_length_are_other_prompts(tmp_path, student):
    """Their texts, and so their fingerprint, are the same."""
    for longest in (4, 6, 4):
        rollout(make_config(tmp_path, student, prompts=5, max_prompt_tokens=longest, long_prompts="truncate"))
    cache = open_cache(tmp_path / "cache")
    assert [cache.load_prompts(id_).tokens.lengths.max() for id_, _ in cache.manifests("prompts")] == [4, 6]


def test_duplicates_and_long_prompts_are_counted(tmp_path, student):
    prompts = ["the cat", "a dog", "the cat", "the cat sees two big dogs", "the cat"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    report = rollout(make_config(tmp_path, student, max_prompt_tokens=5, long_prompts="drop"))
    assert (report.prompts, report.rollouts, report.duplicates, report.too_long) == (2, 4, 2, 1)
    (line,) = str(report).splitlines()
    assert line.startswith("4 rollouts of 2 prompts (left out: 2 duplicates, 1 too long): mean length ")


def test_killed_and_started_again_gives_the_rollouts_of_an_uninterrupted_run(tmp_path, student, monkeypatch):
    config = make_config(tmp_path, student, prompts=23)
    commit, commits = Cache.commit_rollouts, []

    def dying(cache: Cache, *segment) -> str:
        if len(commits) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        commits.append(commit(cache, *segment))
        return commits[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "commit_rollouts", dying)
        assert exit_code(in_child(lambda: rollout(config))) == -signal.SIGKILL
    kept = open_cache(config.cache).manifests("rollouts")
    assert len(kept) == 2

    assert rollout(config).already_there == sum(m.rows for _, m in kept)
    cache = open_cache(config.cache)
    assert {id_ for id_, _ in kept} <= ids_in(cache)
    rollout(make_config(tmp_path, student, cache=tmp_path / "other"))
    uninterrupted = open_cache(tmp_path / "other")
    assert contents(cache) == contents(uninterrupted)
    assert spans(cache) == spans(uninterrupted)
    assert sum(map(len, contents(cache).values())) == 46


def test_ranges_of_prompts_as_the_learner_asks_for_them(tmp_path, student):
    config = make_config(tmp_path, student, prompts=9)
    rollout(config)
    cache, model = open_cache(config.cache), make_t5("1.1")
    prompts_id, _ = cache.manifests("prompts")[-1]
    info = cache.manifests("rollouts")[0][1].info
    policy = info.policy.model_copy(update={"name": "run", "step": 7, "fingerprint": "0" * 64})

    def ensure(*wanted: tuple[int, int]):
        ranges = [(prompts_id, *some) for some in wanted]
        return ensure_rollouts(cache, ranges, lambda: model, policy, info.tokenizer, config, None)

    ((new, *prompts),), sampled = ensure((1, 3))
    assert (prompts, sampled) == ([1, 3], 4)
    assert cache.manifest(new).info.policy == policy
    assert cache.load_rollouts(new).prompt_index.tolist() == [1, 1, 2, 2]
    assert ensure((1, 3)) == ([(new, 1, 3)], 0)
    held, sampled = ensure((2, 4), (0, 2))  # at the end, from the start
    assert (held[0], held[3], [some[1:] for some in held], sampled) == (
        (new, 2, 3), (new, 1, 2), [(2, 3), (3, 4), (0, 1), (1, 2)], 4
    )  # fmt: skip


def test_a_segment_holds_256k_tokens_unless_that_takes_too_long(tmp_path, student, monkeypatch):
    rollout(make_config(tmp_path, student, prompts=23))
    monkeypatch.setattr(rollout_module, "SECONDS_PER_SEGMENT", 0)
    rollout(make_config(tmp_path, student, cache=tmp_path / "slow"))
    few, slow = (open_cache(tmp_path / name) for name in ("cache", "slow"))
    assert max(stop - start for start, stop in spans(slow)) == 2
    assert len(spans(slow)) > len(spans(few))
    assert contents(slow) == contents(few)
    monkeypatch.undo()
    assert (rollout_module.TOKENS_PER_SEGMENT, rollout_module.SECONDS_PER_SEGMENT) == (262_144, 300)


def test_another_tokenizer_does_not_fit_into_the_cache(tmp_path, student):
    rollout(make_config(tmp_path, student))
    before = ids_in(open_cache(tmp_path / "cache"))
    other = save_model(tmp_path / "other", "1.1")
    make_tokenizer(WORDS[::-1]).save_pretrained(other)
    with pytest.raises(MismatchError, match=rf"^.*use another --cache: tokenizers {other} and {student} encode.*$"):
        rollout(make_config(tmp_path, other))
    assert ids_in(open_cache(tmp_path / "cache")) == before


@pytest.mark.parametrize(
    ("content", "changes"),
    [("", {}), (LONG, {"max_prompt_tokens": 3, "long_prompts": "drop"}), (LONG, {"max_prompt_tokens": 3}),
     ('{"prompt": "the cat"}\n', {"student": "no/such/student"})],
)  # fmt: skip
def test_no_cache_is_made_of_bad_data_or_for_no_student(tmp_path, student, content, changes):
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ModelError if "student" in changes else DataError):
        rollout(make_config(tmp_path, student, **changes))
    assert not (tmp_path / "cache").exists()


def test_first_samples_for_some_prompts_and_stores_them_all(tmp_path, student):
    """11 of 23 prompts, over the end of a prompts segment: the same rollouts as of all, but fewer; then the others."""
    report = rollout(make_config(tmp_path, student, prompts=23, first=11))
    assert (report.prompts, report.rollouts) == (23, 22)
    rollout(make_config(tmp_path, student, cache=tmp_path / "whole"))
    assert sum(m.rows for _, m in open_cache(tmp_path / "cache").manifests("prompts")) == 23
    found, expected = completions(tmp_path / "cache"), completions(tmp_path / "whole")
    assert len(found) == 11
    assert found.items() <= expected.items()
    report = rollout(make_config(tmp_path, student, first=5))
    assert (report.rollouts, report.already_there) == (10, 10)
    assert rollout(make_config(tmp_path, student)).already_there == 22
    assert completions(tmp_path / "cache") == expected
