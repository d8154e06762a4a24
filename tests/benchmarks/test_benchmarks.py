"""The GPU script runs on any machine at toy size, and says what it measured; a measured peak is a peak, and the parts
of a measured time belong to it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import decoder_pair, lab, lora, released, soak, timed_run, trl_live
from benchmarks.common import forget_peak, merged, peak, run, sample
from ketchup_cache import open_cache
from tests.helpers.errors import refuses

ROOT = Path(__file__).parents[2]


def gpu(*words):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_gpu_script_runs_without_a_gpu(tmp_path):
    done = gpu("--tiny", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tiny"] is True
    assert [entry["samples"] for entry in found["scoring"]] == [4, 1]
    for entry in found["scoring"]:
        assert entry["flops"] / found["matrix_flops"] == entry["share_of_matrix_rate"] > 0
    assert found["exactness"]["largest_difference"] < 1e-4
    # at least the embedding of the toy shape, float32
    assert found["weights_bytes"] > 4 * 64 * 32_100
    both, alone = found["learning"]["with teacher"], found["learning"]["without teacher"]
    assert both["every 2"].keys() == {"sample", "score", "tokens"}
    for measured in (both["learn"], alone["learn"]):
        assert measured.keys() == {"float32", "bfloat16"}
        assert min(*measured.values(), both["every 2"]["score"], both["every 1"]["sample"]) > 0
    assert str(found["matrix_flops"] / 1e12)[:3] in done.stdout


def test_it_refuses_three_billion_parameters_on_a_cpu():
    assert ((done := gpu()).returncode, "use --tiny" in done.stderr) == (1, True)


def test_peak_sees_memory_that_is_gone_again():
    before = forget_peak()
    np.ones(40_000_000)  # 320 MB, freed at once
    assert 300e6 < peak() - before < 400e6


def test_a_process_is_charged_its_memory_and_time():
    mine = b"1" * 400_000_000  # of the process that asks: not of the one that is measured
    code = "x = b'1' * 200_000_000\nimport time; b = time.process_time()\nwhile time.process_time() < b + .3: pass"
    found = run(sys.executable, "-c", code)
    assert 200e6 < found["peak_bytes"] < 260e6 < len(mine)
    assert 0.3 <= found["cpu_seconds"] <= found["seconds"] + 0.1


def test_mix_of_lengths():
    batch = sample(0, 8_000)
    prompts, completions = batch.prompts.tokens.lengths, batch.rollouts.completions.lengths
    assert 165 < np.median(prompts) < 195 < prompts.max() <= 1024
    assert 24.5 < completions.mean() < 25.5
    assert 7.5 < completions.std() < 8.5
    assert (np.bincount(batch.rollouts.prompt_index) == 4).all()


def test_the_parts_of_a_timed_command_are_its_own(tmp_path):
    """Reading models counts in no other part; the rest is within the whole, and a live teacher is called."""
    task = ROOT / "data" / "translate"
    learning = {"student": task / "predistilled", "steps": 2, "batch_size": 8, "samples": 4, "max_new_tokens": 12,
                "rollout_batch": 64}  # fmt: skip
    data = {"data": task / "prompts.jsonl", "limit": 16}
    ways = [timed_run.Way.of(word) for word in ("live@1e-3", "offlinex2")]
    (live, trained), (alone, _) = (
        timed_run.by(way, tmp_path, task / "teacher", task / "student", data, learning) for way in ways
    )
    for run_ in (live, *alone["parts"].values()):
        load, score, train, work = (run_[part]["seconds"] for part in ("load", "score", "train", "work"))
        assert 0 < load < run_["seconds"] - work
        assert score + train < work + 1e-3
    assert min(live["score"]["seconds"], live["train"]["seconds"]) > 0
    assert alone["parts"]["learn"]["score"]["seconds"] == 0
    steps = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert live["train"]["seconds"] == pytest.approx(sum(step["train_s"] for step in steps), abs=0.01)
    assert [step["refreshed"] for step in steps] == [True, True]
    assert max(step["lr"] for step in steps) == 1e-3
    cache = tmp_path / "cache, offline, each rollout 2 times"
    assert len(list(open_cache(cache).rows())) == 2 * 8 / 2  # of two steps of eight
    assert alone["work"]["seconds"] == pytest.approx(sum(p["work"]["seconds"] for p in alone["parts"].values()))
    assert alone["peak_bytes"] == max(part["peak_bytes"] for part in alone["parts"].values())
    rows = timed_run.rows([{"name": "live", **{k: v for k, v in live.items() if k != "name"}}, alone], 16)
    name = "offline, each rollout 2 times"
    assert [row[0] for row in rows] == ["live", name, f"{name}, learning alone"]
    assert all(len(row) == len(timed_run.HEAD) for row in rows)
    faster = live["work"]["seconds"] / alone["parts"]["learn"]["work"]["seconds"]
    assert float(rows[2][timed_run.HEAD.index("× live (wall)")]) == pytest.approx(faster, abs=0.01)


def test_the_table_of_a_growing_lab_is_that_of_its_results():
    results = json.loads((ROOT / "benchmarks/results/lab.json").read_text())
    assert lab.drawn(results["caches"]) in (ROOT / "docs/growth.md").read_text()


def test_the_table_of_the_program_as_released_is_that_of_its_results():
    results = json.loads((ROOT / "benchmarks/results/released.json").read_text())
    assert released.drawn(results["runs"], 5) in (ROOT / "docs/results.md").read_text()


def test_the_table_of_the_lora_page_is_that_of_its_results():
    results = ROOT / "benchmarks/results/lora.json"
    table = lora.drawn(json.loads(results.read_text())) if results.exists() else ""
    assert lora.shown((ROOT / "docs/lora.md").read_text()).strip() == table


GIVEN = {"lr": 1, "k": 4, "baseline": "mean", "samples": 8, "steps": 3}


@pytest.mark.parametrize(
    ("word", "name", "every", "uses", "changed"),
    [
        ("live", "live", 1, 1, {}), ("live@1e-4", "live, lr 0.0001", 1, 1, {"lr": 1e-4}),
        ("4", "every 4 steps", 4, 1, {}), ("offline", "offline", None, 1, {}),
        ("16x4@2e-4", "every 16 steps, each rollout 4 times, lr 0.0002", 16, 4, {"lr": 2e-4}),
        ("offlinex16@1e-4", "offline, each rollout 16 times, lr 0.0001", None, 16, {"lr": 1e-4}),
    ],
)  # fmt: skip
def test_ways(word, name, every, uses, changed):
    way, of_method = timed_run.Way.of(word), timed_run.Way.of(f"reverse-kl:{word}")
    assert (way.name, way.every, way.uses, way.learning(GIVEN)) == (name, every, uses, GIVEN | changed)
    assert (of_method.name, of_method.every, of_method.uses) == (f"reverse-kl, {name}", every, uses)
    own = {"samples": 1, "steps": 3, "method": "reverse-kl", "keep_top": timed_run.KEEP_TOP}
    assert of_method.learning(GIVEN) == {"lr": 1} | own | changed


def test_each_method_is_compared_with_its_own_live_run():
    found = [("live, lr 0.1", 8, None), ("live", 9, None), ("every 4 steps", 3, None)]
    found += [(f"reverse-kl, {way}, lr 0.2", s, "reverse-kl") for way, s in (("live", 4), ("every 4 steps", 2))]
    runs = [{"name": n, "method": m, "peak_bytes": 1, "work": dict.fromkeys(timed_run.UNITS, s)} for n, s, m in found]
    place = timed_run.HEAD.index("× live (wall)")
    assert [row[place] for row in timed_run.rows(runs, 8)] == ["1.12", "1.00", "3.00", "1.00", "2.00"]


def test_without_trl_the_rest_is_said_to_run(tmp_path, capsys):
    assert not trl_live.has_trl("")
    assert "--trl-python" in capsys.readouterr().err
    (python := tmp_path / "python").write_text("#!/bin/sh\necho 'No module named trl' >&2\nexit 1\n")
    python.chmod(0o755)
    assert not trl_live.has_trl(str(python))
    assert f"{python} can't import it (No module named trl)" in capsys.readouterr().err
    refuses(SystemExit, "--trl-python /no/such/python: No such file", trl_live.has_trl, "/no/such/python")


def test_prompts_of_two_seeds_are_different_and_new_to_the_student():
    one, two = (trl_live.prompts_for(seed, 4096) for seed in (0, 1))
    assert len(set(one) | set(two)) == 2 * 4096
    seen = (trl_live.TASK / "prompts.jsonl").read_text().splitlines()[: decoder_pair.PREDISTILLED_ON]
    assert not {f"{json.loads(line)['prompt']} =>" for line in seen} & {*one, *two}
    refuses(SystemExit, "lower --steps", trl_live.prompts_for, 9, 4096)


def test_what_is_run_again_replaces_and_the_rest_stays():
    (live, other, again, offline) = (
        {"name": name, "seed": seed, "s": s} for name, seed, s in
        (("live", 0, 9), ("live", 1, 8), ("live", 0, 7), ("offline", 0, 2))
    )  # fmt: skip
    note = {"note": "a"}
    assert merged([live | note, other], [again, offline], ("name", "seed")) == [again | note, other, offline]


def test_the_decoder_pair_shares_words_and_the_teacher_is_larger(tmp_path):
    from ketchup_cache.models.load import load_model, load_tokenizer

    sizes = []
    for name, shape in (("teacher", decoder_pair.TEACHER), ("student", decoder_pair.STUDENT)):
        folder = decoder_pair.untrained(tmp_path / name, shape, 0)
        sizes.append(sum(p.numel() for p in load_model(str(folder)).parameters()))
        # the tokenizer as it is read from a Qwen2 folder: one word one token, no EOS after the prompt
        ids = load_tokenizer(str(folder))("my cat laughed =>")["input_ids"]
        assert len(set(ids)) == 4
        assert not {1, 2} & set(ids)
    assert sizes[0] / sizes[1] > 10


def test_the_page_shows_the_tally_of_the_soak():
    """`benchmarks/soak.py` writes both; nobody edits one of them."""
    tally = json.loads(soak.RESULTS.read_text())
    assert soak.table(tally) in soak.DOCS.read_text()
    for name, counts in tally.items():
        wrong = {key for key in soak.GOOD if isinstance(counts, dict) and counts.get(key)}
        assert not wrong, name
