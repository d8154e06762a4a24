"""A run repeated from its pins, after its cache has grown, comes to the same weights, and nothing else is taken."""

from __future__ import annotations

import json

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.errors import MismatchError
from ketchup_cache.training.learn import learn
from ketchup_cache.types import Prompts
from tests.helpers.caches import make_cache
from tests.helpers.models import write_prompts


def pinned(run):
    return json.loads((run / "pins.json").read_text())["segments"]


@pytest.mark.parametrize("method", ["ketchup", "seqkd"])
def test_an_offline_run_repeats_itself_and_refuses_another_cache(tmp_path, folders, method):
    student, teacher = folders
    cache = make_cache(tmp_path / "cache", student, teacher)
    outputs = {} if method == "ketchup" else {"teacher_outputs": str(student)}

    def run(out, **options):
        options = {"student": str(student), "cache": cache.path, "batch_size": 4, "lr": 1e-2} | options
        # 6 steps: the rows of both segments, in whatever order
        return learn(LearnConfig(out=tmp_path / out, steps=6, method=method, **outputs, **options))

    first = run("first")
    assert sorted(pinned(tmp_path / "first")) == sorted(id_ for id_, _ in cache.manifests())
    make_cache(cache.path, student, teacher, seed=7)
    assert run("grown").fingerprint != first.fingerprint
    assert len(pinned(tmp_path / "grown")) == 6
    assert run("again", pin=tmp_path / "first" / "pins.json").fingerprint == first.fingerprint
    assert pinned(tmp_path / "again") == pinned(tmp_path / "first")
    other = make_cache(tmp_path / "other", student, teacher)
    with pytest.raises(MismatchError, match="lacks 3 of the 3"):
        run("refused", pin=tmp_path / "first" / "pins.json", cache=other.path)


def test_an_on_policy_run_pins_its_refreshes_and_its_teacher_outputs(tmp_path, folders, capsys):
    """js: half on the student's samples, made anew every 2 steps, half on the teacher's outputs."""
    student, teacher = map(str, folders)
    cache, data = str(tmp_path / "cache"), str(write_prompts(tmp_path / "d.jsonl", 8))
    rollout = ["rollout", "--data", data, "--cache", cache, "--max-new-tokens", "6", "--device", "cpu", "--student"]
    assert main([*rollout, teacher, "--greedy"]) == 0
    score = ["score", "--teacher", teacher, "--cache", cache, "--keep-top", "4", "--device", "cpu"]
    assert main(score) == 0
    with_more = open_cache(cache)  # prompts that the run counts but does not come to: their number sets the order
    (prompts_id, manifest), *_ = with_more.manifests("prompts")
    prompts = with_more.load_prompts(prompts_id)
    with_more.commit_prompts(Prompts(prompts.ids[:3], prompts.tokens.slice(0, 3)), manifest.info)
    words = ["learn", "--student", student, "--teacher", teacher, "--cache", cache, "--method", "js", "--keep-top", "4",
             "--teacher-outputs", teacher, "--steps", "4", "--refresh-every", "2", "--batch-size", "4", "--lr", "1e-3",
             "--max-new-tokens", "6", "--device", "cpu", "--out"]  # fmt: skip
    assert main([*words, str(tmp_path / "first")]) == 0
    made = open_cache(cache)
    used = set(pinned(tmp_path / "first"))
    assert used == {id_ for id_, _ in made.manifests()}
    assert sum(info.policy.name != teacher for _, info in made.rollouts()) == 2
    # the cache grows: prompts that a run without pins would go on to, and more teacher outputs
    more = str(write_prompts(tmp_path / "more.jsonl", 20))
    assert main([*rollout[:2], more, *rollout[3:], teacher, "--greedy"]) == 0
    assert main(score) == 0
    pin = ["--pin", str(tmp_path / "first" / "pins.json")]
    before = set(open_cache(cache).segment_ids())
    assert main([*words, str(tmp_path / "again"), *pin]) == 0
    fingerprints = [json.loads((tmp_path / o / "report.json").read_text())["fingerprint"] for o in ("first", "again")]
    assert fingerprints[0] == fingerprints[1]
    assert set(pinned(tmp_path / "again")) == used
    assert set(open_cache(cache).segment_ids()) == before
    # another seed needs rollouts that are not pinned
    assert main([*words, str(tmp_path / "other"), *pin, "--seed", "1"]) == 2
    assert "the pinned run has no such rollouts" in capsys.readouterr().err.splitlines()[-1]
    assert set(open_cache(cache).segment_ids()) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b'{"segments": []}', b'{"segments": [1]}', b'{"segments": ["../x"]}', b'["a"]', b"\xff", None],
)
def test_a_file_that_holds_no_pins_is_refused_in_one_line(tmp_path, folders, capsys, content):
    make_cache(tmp_path / "cache", *folders, prompts=2)
    if content is not None:
        (tmp_path / "pins.json").write_bytes(content)
    words = ["learn", "--student", str(folders[0]), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*words, "--pin", str(tmp_path / "pins.json")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "[transformers]" not in line]
    assert len(lines) == 1
    assert "take pins.json from the folder of a run" in lines[0]
    assert not (tmp_path / "run").exists()
