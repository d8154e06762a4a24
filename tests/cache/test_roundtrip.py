"""What is committed comes back bit for bit, also through plain Zarr; the written format is the real one."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import zarr
from hypothesis import given, settings, strategies as st
from zarr.storage import ZipStore

from ketchup_cache import open_cache
from ketchup_cache.cache import rules as segments, zarr_files as arrays
from ketchup_cache.cache.cache import Cache
from ketchup_cache.errors import CacheError, MismatchError, NumericsError
from ketchup_cache.schemas.generate import SCHEMAS, render
from ketchup_cache.types import Ragged, Rollouts, Scores
from tests.helpers import segments as made
from tests.helpers.errors import refuses

examples = settings(derandomize=True, deadline=None, max_examples=25)
SCHEMA_FOLDER = files("ketchup_cache.schemas")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One growing cache for many examples."""
    root = tmp_path_factory.mktemp("shared") / "cache"
    open_cache(root, create=True)
    return root


lengths = st.lists(st.integers(0, 9), max_size=6)
vocabularies = st.sampled_from([1, 2, 255, 2**16, 2**16 + 1, 250_112, 2**31])


@examples
@given(lengths, lengths, vocabularies, st.booleans(), st.integers(0, 999))
def test_round_trip(shared: Path, prompt_lengths, row_lengths, vocab_size: int, forced: bool, seed: int) -> None:
    cache = open_cache(shared)
    row_lengths = row_lengths if prompt_lengths else []
    of = {"seed": seed, "vocab_size": vocab_size}
    prompts = made.make_prompts(prompt_lengths, **of)
    prompts.tokens.values[-1:] = vocab_size - 1  # the largest id
    rollouts = made.make_rollouts(row_lengths, prompts=len(prompt_lengths), forced=forced, **of)
    start = seed % (len(rollouts) + 1)
    scores = made.make_scores(rollouts, start, len(rollouts), **of)
    p = cache.commit_prompts(prompts, made.prompts_info(vocab_size))
    r = cache.commit_rollouts(rollouts, made.rollouts_info(p, len(prompts), vocab_size=vocab_size))
    s = cache.commit_scores(scores, made.scores_info(r, start, len(rollouts), vocab_size=vocab_size))

    reopened = open_cache(shared)
    assert made.same(reopened.load_prompts(p), prompts)
    assert made.same(reopened.load_rollouts(r), rollouts)
    assert made.same(reopened.load_scores(s), scores)
    sizes = [(len(lengths), sum(lengths)) for lengths in (prompt_lengths, row_lengths, row_lengths[start:])]
    assert [(m.rows, m.tokens) for m in map(reopened.manifest, (p, r, s))] == sizes
    assert ("forced" in reopened.manifest(r).arrays) == bool(rollouts.forced.any())
    assert reopened.manifest(p).arrays["tokens"].dtype == ("uint16" if vocab_size <= 65536 else "uint32")


@examples
@given(
    st.sampled_from(["bool", "uint8", "uint16", "uint32", "int64", "float16", "float32"]),
    st.sampled_from([(0,), (1,), (7,), (0, 16), (3, 16), (2**16 + 1, 16), (2**20,), (2**20 + 1,), (2**21 + 5,)]),
    st.booleans(),
)
def test_arrays_of_every_kind_and_size(dtype: str, shape: tuple[int, ...], zeros: bool) -> None:
    """Any bit pattern survives, also NaN and -0.0, and chunks full of zeros are stored as chunks."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = bytes(size) if zeros else np.random.default_rng(1).bytes(size)
    array = np.frombuffer(data, np.uint8)
    array = (array & 1 if dtype == "bool" else array).view(dtype).reshape(shape)
    encoded = arrays.encode({"a": array})
    chunks = -(-shape[0] // (2**16 if len(shape) == 2 else 2**20))
    assert len(encoded) == 2 + chunks
    assert made.same(arrays.decode(encoded, {"a": arrays.entry_of(array)})["a"], array)


def test_plain_zarr_reads_the_same_numbers(cache: Cache) -> None:
    p, r, s = made.fill(cache)
    prompts, rollouts, scores = cache.load_prompts(p), cache.load_rollouts(r), cache.load_scores(s)
    completions = rollouts.completions
    of_rollouts = {n: getattr(rollouts, n) for n in ("prompt_index", "behavior_logprob", "finished", "forced")}
    expected = {
        p: {"ids": prompts.ids, "tokens": prompts.tokens.values, "offsets": prompts.tokens.offsets},
        r: of_rollouts | {"completion_tokens": completions.values, "completion_offsets": completions.offsets},
        s: scores.per_token() | {"final_max_q": scores.final_max_q},
    }
    for segment_id, named in expected.items():
        archive = cache.path / "segments" / segment_id / arrays.ARCHIVE
        group = zarr.open_group(ZipStore(archive, mode="r"), mode="r", zarr_format=3)
        assert set(group.array_keys()) == set(named)
        for name, array in named.items():
            stored = np.asarray(group[name][...])
            assert np.array_equal(stored, array)
            assert stored.dtype.name == cache.manifest(segment_id).arrays[name].dtype


def test_the_example_in_the_format_page_runs(cache: Cache) -> None:
    _, _, s = made.fill(cache)
    page = (SCHEMA_FOLDER / "cache-format.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code.replace('"my-cache"', repr(str(cache.path))), names)
    assert np.array_equal(names["gap"], cache.load_scores(s).max_q - cache.load_scores(s).q)


def test_the_format_page_lists_the_arrays(cache: Cache) -> None:
    page = (SCHEMA_FOLDER / "cache-format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\[.*?\])` \| (\S+)", page, re.MULTILINE)
    documented = {name: dtype for name, _, dtype in rows}
    stored = {name: e.dtype for i in made.fill(cache) for name, e in cache.manifest(i).arrays.items()}
    scores = cache.manifests("scores")[0][1].info.model_copy(update={"keep_top": 2, "storage": "compact"})
    stored |= {name: dtype for name, (dtype, _) in segments.layout(scores, 1, 1).items() if name not in stored}
    tokens = {"tokens": "token", "completion_tokens": "token", "top_ids": "token", "top_q": "float32"}
    assert documented == stored | tokens | {"rest_logsumexp": "float32"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_files_are_up_to_date(name: str) -> None:
    """If not: python -m ketchup_cache.schemas.generate"""
    assert (SCHEMA_FOLDER / name).read_text(encoding="utf-8") == render(SCHEMAS[name]())


def test_manifests_and_the_marker_follow_the_schema(cache: Cache) -> None:
    schema = json.loads((SCHEMA_FOLDER / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for segment_id in made.fill(cache):
        manifest = json.loads((cache.path / "manifests" / f"{segment_id}.json").read_bytes())
        validator.validate(manifest)
        for key in manifest:
            assert not validator.is_valid({k: v for k, v in manifest.items() if k != key})
        assert not validator.is_valid(manifest | {"version": 3})
    assert json.loads((cache.path / "ketchup-cache.json").read_bytes()) == {"format": "ketchup-cache", "version": 2}


def test_the_store_is_torch_free(cache: Cache) -> None:
    made.fill(cache)
    code = (
        "import sys; from ketchup_cache.cache import inspect; from ketchup_cache import open_cache;"
        f"cache = open_cache({str(cache.path)!r}); inspect.describe(cache); assert inspect.verify(cache).ok;"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- what is not stored


ROLLOUTS, N = made.make_rollouts((5, 2, 7)), 14


def bad_logprob(value: float) -> Rollouts:
    return replace(ROLLOUTS, behavior_logprob=np.full(N, value, np.float32))


def bad_tokens(value: int) -> Rollouts:
    return replace(ROLLOUTS, completions=ROLLOUTS.completions.with_values(np.full(N, value, np.int32)))


UNORDERED = Ragged(ROLLOUTS.completions.values, np.array([0, 7, 5, N]))
ENDLESS = replace(made.make_rollouts((0, 2, 7)), finished=np.array([True, False, False]))
BAD_ROLLOUTS = {
    "NaN": (bad_logprob(np.nan), NumericsError, r"logprob\[0\] is nan"),
    "-inf": (bad_logprob(-np.inf), NumericsError, "must be finite"),
    "probability above 1": (bad_logprob(0.5), CacheError, "more than 1"),
    "float64": (replace(ROLLOUTS, behavior_logprob=np.zeros(N)), CacheError, r"is float64 \[14\], must be float32"),
    "too short": (replace(ROLLOUTS, forced=np.zeros(N - 1, bool)), CacheError, r"forced is bool \[13\], must be"),
    "foreign prompt": (replace(ROLLOUTS, prompt_index=np.array([0, 3, 1])), CacheError, r"prompt_index\[1\] is outs"),
    "negative prompt": (replace(ROLLOUTS, prompt_index=np.array([0, 1, -1])), CacheError, r"prompt_index\[2\] is out"),
    "beyond the vocabulary": (bad_tokens(60), CacheError, r"tokens\[0\] is not a token id of words, which has 60"),
    "negative id": (bad_tokens(-1), CacheError, r"completion_tokens\[0\] is not a token id"),
    "offsets": (replace(ROLLOUTS, completions=UNORDERED), CacheError, "do not rise from 0 to 14"),
    "finished without EOS": (ENDLESS, CacheError, r"finished\[0\] is a finished rollout without a token"),
}


@pytest.mark.parametrize("name", BAD_ROLLOUTS)
def test_broken_rollouts_are_not_committed(cache: Cache, name: str) -> None:
    rollouts, error, match = BAD_ROLLOUTS[name]
    p = made.add_prompts(cache)
    refuses(error, match, cache.commit_rollouts, rollouts, made.rollouts_info(p, 3))
    assert [i for i, _ in cache.manifests()] == [p]


def test_parts_that_do_not_belong_together_are_not_committed(cache: Cache) -> None:
    p = made.add_prompts(cache)
    with pytest.raises(MismatchError, match="must share a tokenizer"):
        cache.commit_rollouts(ROLLOUTS, made.rollouts_info(p, 3, vocab_size=61))
    with pytest.raises(CacheError, match=r"covers rows 0 to 4 of prompts .*, which has 3"):
        cache.commit_rollouts(ROLLOUTS, made.rollouts_info(p, 4))
    with pytest.raises(CacheError, match=r"rollouts \(new\) needs prompts 000000000000, which is not in this cache"):
        cache.commit_rollouts(ROLLOUTS, made.rollouts_info("0" * 64, 3))
    r = cache.commit_rollouts(ROLLOUTS, made.rollouts_info(p, 3))
    scores = made.make_scores(ROLLOUTS, 0, 3)
    with pytest.raises(CacheError, match="scores of 14 tokens for rollouts that have 7"):
        cache.commit_scores(replace(scores, final_max_q=np.zeros(2, np.float32)), made.scores_info(r, 0, 2))
    info, broken = made.scores_info(r, 0, 3), Scores(*(np.full(n, np.nan, np.float32) for n in (N, N, N, N, 3)))
    refuses(NumericsError, r"q\[0\] is nan", cache.commit_scores, broken, info)
    refuses(CacheError, "Rollouts can't be a segment of kind scores", cache.commit_scores, ROLLOUTS, info)
    refuses(CacheError, f"segment {r} does not hold scores", cache.load_scores, r)
    assert len(cache.manifests()) == 2


def test_rounding_is_not_an_error(cache: Cache) -> None:
    """A one-token vocabulary: q, max, logsumexp and mean are the same number up to rounding."""
    one = np.zeros(1, np.float32)
    rollouts = Rollouts(np.zeros(1, np.int64), Ragged.from_rows([[0]], np.int32), one, one > 0, one > 0)
    p = made.add_prompts(cache, (1,), vocab_size=1)
    r = cache.commit_rollouts(rollouts, made.rollouts_info(p, 1, vocab_size=1))
    near = np.array([40.0], np.float32)
    scores = Scores(near * np.float32(1 + 1e-6), near, near * np.float32(1 - 1e-6), near * np.float32(1 + 1e-6), near)
    assert made.same(cache.load_scores(cache.commit_scores(scores, made.scores_info(r, 0, 1, vocab_size=1))), scores)


def test_too_large_for_one_segment(cache: Cache, monkeypatch) -> None:
    monkeypatch.setattr(arrays, "MAX_BYTES", 100)
    refuses(CacheError, r"bytes in one segment, the limit is 100: store it in several", made.add_prompts, cache)
    assert cache.manifests() == []
