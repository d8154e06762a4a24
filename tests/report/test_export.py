"""Exported rows, read back with pyarrow and datasets, are those of the cache bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from tests.helpers.errors import fails
from tests.helpers.segments import VOCAB, add_prompts, make_rollouts, make_scores, rollouts_info, scores_info

LISTS = ("prompt_tokens", "completion_tokens", "forced", "behavior_logprob", "q", "max_q", "logsumexp", "mean_q")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Two policies. The first is scored but for its last row, by two segments; the second has no scores."""
    made = open_cache(tmp_path_factory.mktemp("export") / "c", create=True)
    prompts = add_prompts(made)
    rollouts = make_rollouts((5, 2, 7, 1, 3, 4), forced=True)
    child = made.commit_rollouts(rollouts, rollouts_info(prompts, 3, samples=2))
    for start, stop in ((0, 2), (2, 5)):
        scores = make_scores(rollouts, start, stop, seed=start, top=6)
        made.commit_scores(scores, scores_info(child, start, stop, keep_top=6))
    made.commit_rollouts(make_rollouts((2, 2), seed=5), rollouts_info(prompts, 3, policy="other"))
    return made


def read(out, to="parquet"):
    return pq.read_table(out / "rows.parquet").to_pylist() if to == "parquet" else list(datasets.load_from_disk(out))


@pytest.mark.parametrize("to", ["parquet", "hf-dataset"])
def test_every_value_comes_back(cache, tmp_path, to, capsys):
    assert main(["export", str(cache.path), str(tmp_path / "out"), "--to", to, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found, wanted = read(tmp_path / "out", to), list(cache.rows())
    assert (report["rows"], report["scored"], report["tokens"]) == (5, 5, 5 + 2 + 7 + 1 + 3)
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert report["files"] == len(list((tmp_path / "out").iterdir()))
    assert len(found) == len(wanted) == 5
    child, info = cache.rollouts()[0]
    for i, (row, true) in enumerate(zip(found, wanted, strict=True)):
        for name in LISTS:
            np.testing.assert_array_equal(np.array(row[name], getattr(true, name).dtype), getattr(true, name), name)
        for name in ("prompt_id", "finished", "policy", "teacher"):
            assert row[name] == getattr(true, name), name
        assert np.float32(row["final_max_q"]) == np.float32(true.final_max_q)
        assert (row["rollouts_segment"], row["row"], row["policy_step"]) == (child, i, None)
        assert row["policy_fingerprint"] == info.policy.fingerprint
        assert row["teacher_fingerprint"] == cache.teachers()[0].fingerprint
    # the cache's own reader joined these, so look at one of them from the segments
    assert found[4]["completion_tokens"] == cache.load_rollouts(child).completions[4].tolist()
    assert "top_q" not in found[0]


def test_the_largest_logits_and_rows_without_scores(cache, tmp_path):
    words = ["export", str(cache.path), str(tmp_path / "out"), "--to", "parquet", "--keep-top", "4", "--unscored"]
    assert main(words) == 0
    found = read(tmp_path / "out")
    tops = [cache.load_scores(id_).top for id_, _ in cache.manifests("scores")]
    for name, whole in (("top_q", [top.q for top in tops]), ("top_ids", [top.ids for top in tops])):
        read_back = np.array([x for r in found[:5] for x in r[name]], whole[0].dtype)
        np.testing.assert_array_equal(read_back, np.concatenate(whole)[:, :4])
    assert [(r["policy"], r["row"]) for r in found[5:]] == [("student", 5), ("other", 0), ("other", 1)]
    for row in found[5:]:
        assert all(row[name] is None for name in ("q", "max_q", "final_max_q", "teacher", "top_q", "top_ids"))
        assert len(row["completion_tokens"]) == len(row["behavior_logprob"])
    about = json.loads(pq.read_schema(tmp_path / "out" / "rows.parquet").metadata[b"ketchup-cache"])
    assert about["tokenizers"][0]["vocab_size"] == VOCAB
    assert about["teachers"][0]["name"] == "teacher"


def test_what_is_chosen_and_what_does_not_fit(cache, tmp_path, capsys):
    export = ["export", str(cache.path), str(tmp_path / "out"), "--to", "parquet"]
    for words, wanted in (
        (["--policy", "other"], "holds no scored rollouts that fit; --unscored"),
        (["--keep-top", "7"], "holds no scored rollouts that fit"),
        (["--policy", "nobody"], "nobody"),
        (["--scored-by", "nobody"], "nobody"),
        (["--to", "csv"], "parquet"),
    ):
        assert wanted in fails(capsys, *export, *words)
        assert not (tmp_path / "out").exists()
    assert main([*export, "--policy", "other", "--unscored"]) == 0
    assert [r["policy"] for r in read(tmp_path / "out")] == ["other", "other"]
    assert "is there already" in fails(capsys, *export)


def test_a_damaged_segment_leaves_no_output(cache, tmp_path, capsys):
    copied = shutil.copytree(cache.path, tmp_path / "copy")
    victim = copied / "segments" / cache.manifests("scores")[1][0] / "arrays.zip"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "arrays.zip" in fails(capsys, "export", copied, tmp_path / "out", "--to", "parquet")
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_a_segment(tmp_path):
    """Forty segments of 2 MB: the peak grows by a few of them, not by all."""
    cache = open_cache(tmp_path / "c", create=True)
    prompts = add_prompts(cache, [5] * 100)
    for seed in range(40):
        rollouts = make_rollouts([2500] * 100, prompts=100, seed=seed)
        cache.commit_rollouts(rollouts, rollouts_info(prompts, 100, policy=f"p{seed}"))
    code = """
import resource, sys
from ketchup_cache.cli import main
import pyarrow.parquet, datasets
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print("grew", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""
    words = ["export", str(cache.path), str(tmp_path / "out"), "--to", "parquet", "--unscored"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    decoded = 40 * 250_000 * (2 + 4 + 8)  # at least: tokens, log-probabilities and what they become in a table
    grew = 1024 * int(done.stderr.rpartition("grew ")[2])
    assert grew < decoded
    assert pq.read_metadata(tmp_path / "out" / "rows.parquet").num_rows == 4000
