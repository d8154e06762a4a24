"""Offline, refreshed, and live: wall time, memory and return at equal optimizer steps on equal data.

    python -m benchmarks.live_teacher [--only task,proportion,memory] [--ways live,16x4,offlinex16@1e-4] [--add]

Ways: timed_run.py. A learning rate is of `task` alone; it was chosen on the dev split (docs/log.md). Offline is charged
with `rollout` and `score` too; `learning alone` is what a second run on the same cache costs. Times are without
start-up and reading models (timed_run.py); a live teacher stays in memory. `--add --test 0` takes the times again and
keeps the returns.

1. `task`: the shipped task `translate`, where a return means something but the teacher (1.0M parameters) is only five
   times the student. Return: mean G₁ of greedy outputs on the test split, under the teacher, ± the standard error over
   seeds; times are of the seed that took the median time.
2. `proportion`: a teacher of T5-base's shape and a student of a twelfth of its cost, as FLAN-T5-XL has with T5-base
   (13); random weights, prompts log-normal around 180 tokens, 4 completions of 25 tokens each.
3. `memory`: peak memory where models are large enough to show: T5-small-shaped student, T5-base-shaped teacher, random
   weights. `student-only` takes the same optimizer steps on the same batch without a cache, a teacher or the learn
   command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    ROOT,
    T5_BASE,
    T5_SMALL,
    held,
    merged,
    options,
    prompt_lengths,
    publish,
    run,
    t5,
    table,
    tool,
    word_tokenizer,
)
from benchmarks.timed_run import HEAD, Way, by, rows

TASK = ROOT / "data" / "translate"
DECODING = {"max_new_tokens": 36, "rollout_batch": 256}
WAYS = (
    "live,live@1e-4,4,4x4,16x4,offline,offline@1e-4,offlinex4@1e-4,offlinex16@1e-4,"
    "reverse-kl:live@4e-3,reverse-kl:4@4e-3,reverse-kl:4x4@4e-3,reverse-kl:16x4@4e-3,reverse-kl:offlinex4@4e-3,"
    "reverse-kl:offlinex16@4e-3"
)
STUDENT = {"d_model": 320, "d_kv": 64, "d_ff": 1280, "num_layers": 4, "num_heads": 5}
"""Of the part `proportion`."""


def test_return(model: Path, teacher: Path, data: Path, limit: int) -> float:
    words = ["evaluate", "--model", model, "--data", data, "--teacher", teacher, "--metrics", "exact", "--limit", limit]
    decoding = ["--max-new-tokens", DECODING["max_new_tokens"], "--rollout-batch", DECODING["rollout_batch"]]
    command = [sys.executable, "-m", "ketchup_cache", *map(str, [*words, *decoding, "--json"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(done.stdout)["returns"]["mean"])


def by_each_way(
    folder: Path, ways: list[Way], teacher: Path, other: Path, data: dict[str, Any], learning: dict[str, Any]
) -> list[tuple[dict[str, Any], Path]]:
    made = []
    for way in ways:
        made.append(by(way, folder, teacher, other, data, learning))
        print(f"{made[-1][0]['name']}: {made[-1][0]['work']['seconds']:.1f} s", file=sys.stderr, flush=True)
    return made


def on_the_task(folder: Path, steps: int, batch: int, ways: list[Way], test: int, seeds: int) -> list[dict[str, Any]]:
    """Times of the run in the middle, returns of all seeds. The settings are those of the paper's table
    (benchmarks/paper), but for smaller batches: one sample of many prompts, and a mean baseline."""
    teacher, student = TASK / "teacher", TASK / "predistilled"
    data = {"data": TASK / "prompts.jsonl", "skip": 1500, "limit": steps * batch}
    learning = {
        "student": student,
        "steps": steps,
        "batch_size": batch,
        "k": 4,
        "samples": 1,
        "baseline": "mean",
        "lr": 5e-4,
        "warmup": 10,
        "schedule": "linear",
        "checkpoint_every": 0,
        **DECODING,
    }
    runs: list[list[dict[str, Any]]] = [[] for _ in ways]
    returns: list[list[float]] = [[] for _ in ways]
    for seed in range(seeds):
        made = by_each_way(folder / str(seed), ways, teacher, TASK / "student", data, learning | {"seed": seed})
        for (found, trained), measured, values in zip(made, runs, returns, strict=True):
            measured.append(found)
            if test:
                values.append(test_return(trained, teacher, TASK / "test.jsonl", test))
    middle = [sorted(measured, key=lambda one: one["work"]["seconds"])[len(measured) // 2] for measured in runs]
    return [
        one
        | {"work_seconds": [each["work"]["seconds"] for each in measured]}
        | ({"test_returns": values} if test else {})
        for one, measured, values in zip(middle, runs, returns, strict=True)
    ]


def pair_in_proportion(folder: Path, prompts: int, short: bool) -> Path:
    """Saves teacher, student and a third model; returns the prompts' file."""
    rng = np.random.default_rng(0)
    small = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    shapes = {"teacher": T5_BASE, "student": STUDENT, "other": small} if not short else {
        "teacher": small | {"num_layers": 4}, "student": small, "other": small}  # fmt: skip
    for seed, (name, shape) in enumerate(shapes.items()):
        t5(shape, seed=seed).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    with (folder / "data.jsonl").open("w") as file:
        for length in prompt_lengths(rng, prompts):
            words = " ".join(f"w{i}" for i in rng.integers(3, 32_000, length - 1))
            file.write(json.dumps({"prompt": words}) + "\n")
    return folder / "data.jsonl"


def in_proportion(folder: Path, steps: int, batch: int, ways: list[Way], short: bool) -> list[dict[str, Any]]:
    prompts = pair_in_proportion(folder, steps * batch // 4, short)
    learning = {
        "student": folder / "student",
        "steps": steps,
        "batch_size": batch,
        "samples": 4,
        "unfinished": "bootstrap",
        "checkpoint_every": 0,
        "max_new_tokens": 25,
        "rollout_batch": 64,
        "batch_tokens": 4096,
        "micro_batch_tokens": 4096,
    }
    data = {"data": prompts, "limit": steps * batch}
    made = by_each_way(folder, ways, folder / "teacher", folder / "other", data, learning)
    return [found for found, _ in made]


def costs(prompt: int = 190, samples: int = 4, completion: int = 25) -> dict[str, float]:
    """Multiplications of one forward pass over a prompt and its completions, of teacher and student of `proportion`."""

    def forward(shape: dict[str, int]) -> float:
        d, inner, layers = shape["d_model"], shape["d_kv"] * shape["num_heads"], shape["num_layers"]
        encoder = layers * (4 * d * inner + 2 * d * shape["d_ff"])
        decoder = layers * (6 * d * inner + 2 * d * shape["d_ff"]) + 32_100 * d
        crossing = layers * 2 * d * inner  # keys and values of the prompt
        return prompt * (encoder + crossing) + samples * completion * decoder

    return {"teacher": forward(T5_BASE), "student": forward(STUDENT)}


def memory(folder: Path, steps: int, batch: int) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds and peak resident bytes of whole processes."""
    rng = np.random.default_rng(0)
    for name, shape in (("student", T5_SMALL), ("teacher", T5_BASE)):
        t5(shape).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(batch):
            words = " ".join(f"w{i}" for i in rng.integers(3, 32_000, 60))
            file.write(json.dumps({"prompt": words}) + "\n")
    made = ("--samples", 1, "--max-new-tokens", 16, "--rollout-batch", batch)
    scoring = ("--batch-tokens", 2048)
    tool("rollout", "--student", folder / "student", "--data", folder / "data.jsonl", *made, "--cache", folder / "c")
    score = tool("score", "--teacher", folder / "teacher", "--cache", folder / "c", *scoring)
    shutil.copytree(folder / "c", folder / "c-live")
    both = ("--steps", steps, "--batch-size", batch, "--unfinished", "bootstrap", "--micro-batch-tokens", 1024)
    common = ("learn", "--student", folder / "student", *both)
    offline = tool(*common, "--cache", folder / "c", "--out", folder / "offline")
    live = tool(*common, "--cache", folder / "c-live", "--out", folder / "live", *made, *scoring,
                "--teacher", folder / "teacher", "--refresh-every", 1)  # fmt: skip
    alone = run(
        sys.executable, "-m", "benchmarks.live_teacher", "--alone", folder, "--steps", steps, "--batch-size", batch
    )
    return {"student-only": alone, "offline": offline, "live": live, "score": score}


def student_alone(folder: Path, steps: int, batch: int) -> None:
    """Load, AdamW, backward, save: what training this student takes without this tool's loop."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from ketchup_cache.models.head import Head

    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "student").eval()
    Head.of(model, 32_100)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        for _ in range(-(-batch * 77 // 1024)):  # micro-batches of 1024 tokens: 61 of the prompt and 16
            rows = min(13, batch)
            prompt, target = (torch.from_numpy(rng.integers(3, 32_000, (rows, n))) for n in (61, 16))
            states = model.model if hasattr(model, "model") else model
            encoded = states.encoder(input_ids=prompt).last_hidden_state
            hidden = states.decoder(input_ids=target, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
            logits = hidden.flatten(0, 1) @ model.lm_head.weight[:32_100].T * model.config.d_model**-0.5
            torch.nn.functional.cross_entropy(logits, target.flatten()).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
    model.save_pretrained(folder / "alone")


def report_task(chosen: argparse.Namespace, record: dict[str, Any]) -> None:
    count = chosen.steps * chosen.batch_size
    lines = rows(record["runs"], count)
    returns = {}
    for entry in record["runs"]:
        if found := entry.get("test_returns"):
            error = f" ± {statistics.stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
            returns[entry["name"]] = f"{statistics.mean(found):.2f}{error}"
    for line in lines:
        line.append(returns.get(line[0].removesuffix(", learning alone"), ""))
    print(table((*HEAD, "return on test"), lines))
    print(f"\n{chosen.steps} steps of {chosen.batch_size} rollouts; student before: {record['return_before']:.2f}")


def report_memory(large: dict[str, dict[str, float]]) -> None:
    alone = large["student-only"]["peak_bytes"]
    lines = [
        (
            name,
            f"{entry['peak_bytes'] / 1e6:.0f}",
            f"{entry['peak_bytes'] / alone:.2f}",
            f"{entry['seconds']:.0f}",
            f"{entry['cpu_seconds']:.0f}",
        )
        for name, entry in large.items()
    ]
    print(table(("T5-small student, T5-base teacher", "peak MB", "of student-only", "wall s", "CPU s"), lines))


def main() -> None:
    chosen = options(
        __doc__,
        only=("task,proportion,memory", "which parts"),
        steps=(48, "optimizer steps of `task`"),
        batch_size=(256, "rollouts per step of `task`"),
        seeds=(3, "seeds of `task`, for its returns"),
        large_steps=(16, "optimizer steps of `proportion`, of 8 rollouts each"),
        ways=(WAYS, "what to run; a number: steps between new rollouts; x: uses of each; @: learning rate"),
        test=(500, "test sentences for the return; 0: times alone"),
        add=(False, "add to the results file, or replace in it what is run again"),
        alone=("", "(used by the script itself)"),
    )
    if chosen.alone:
        student_alone(Path(chosen.alone), chosen.steps, chosen.batch_size)
        return
    ways, few = [Way.of(word) for word in chosen.ways.split(",")], (chosen.large_steps, 8)
    if chosen.short:
        chosen.steps, chosen.batch_size, chosen.seeds, chosen.test = 4, 64, 1, 50
        ways, few = [Way.of(word) for word in ("live", "reverse-kl:4x2", "offlinex4@1e-4")], (4, 8)
    record = held("live_teacher", chosen) if chosen.add else {}
    parts = {key: record[key] for key in ("task", "proportion", "memory") if key in record}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "task" in chosen.only:
            new = on_the_task(folder / "task", chosen.steps, chosen.batch_size, ways, chosen.test, chosen.seeds)
            before = parts.get("task") or {
                "runs": [],
                "return_before": test_return(
                    TASK / "predistilled", TASK / "teacher", TASK / "test.jsonl", chosen.test or 500
                ),
            }
            sizes = {"steps": chosen.steps, "batch_size": chosen.batch_size}
            parts["task"] = before | {"runs": merged(before["runs"], new)} | sizes
            report_task(chosen, parts["task"])
        if "proportion" in chosen.only:
            (folder / "proportion").mkdir()
            costly = list(dict.fromkeys(replace(way, lr=None) for way in ways))
            new = in_proportion(folder / "proportion", *few, costly, chosen.short)
            cost = costs()
            runs = merged(parts.get("proportion", {}).get("runs", []), new)
            parts["proportion"] = {"steps": few[0], "batch_size": few[1], "multiplications": cost, "runs": runs}
            print("\n" + table(HEAD, rows(runs, few[0] * few[1])))
            ratio = cost["teacher"] / cost["student"]
            print(f"\n{few[0]} steps of {few[1]} rollouts; a forward pass of the teacher is {ratio:.1f} of the student")
        if "memory" in chosen.only:
            (folder / "memory").mkdir()
            parts["memory"] = memory(folder / "memory", 2, 8)
            print()
            report_memory(parts["memory"])
    publish("live_teacher", chosen, **parts)


if __name__ == "__main__":
    main()
