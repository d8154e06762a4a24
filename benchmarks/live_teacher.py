"""Offline, refreshed, and live: wall time, memory and return at equal optimizer steps on equal data.

    python benchmarks/live_teacher.py [--steps 64]

1. On the shipped task `translate`: `learn` with new rollouts, scored by the resident teacher, at every step (live: what
   users of on-policy distillation do today), every 4, 16 and 64 steps, and offline from one scored cache of the same
   number of rollouts. Each is a command in a process of its own; offline is charged with `rollout` and `score` too.
   Return: mean G₁ of greedy outputs on the dev split, under the teacher.
2. Peak memory where models are large enough to show: T5-small-shaped student, T5-base-shaped teacher, random weights.
   `student-only` takes the same optimizer steps on the same batch without a cache, a teacher or the learn command.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, T5_BASE, T5_SMALL, options, publish, run, t5, table, tool, word_tokenizer

TASK = ROOT / "data" / "translate"
DECODING = ("--max-new-tokens", 36, "--rollout-batch", 256)
SAMPLES = 8


def dev_return(model: Path, teacher: Path, data: Path, limit: int) -> float:
    words = ["evaluate", "--model", model, "--data", data, "--teacher", teacher, "--metrics", "exact", "--limit", limit]
    command = [sys.executable, "-m", "ketchup_cache", *map(str, [*words, *DECODING, "--json"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(done.stdout)["returns"]["mean"])


def learning(student: Path, cache: Path, out: Path, steps: int, batch: int, *more: object) -> dict[str, Any]:
    return tool(
        *("learn", "--student", student, "--cache", cache, "--out", out, "--steps", steps, "--batch-size", batch),
        *("--samples", SAMPLES, "--baseline", "leave-one-out", "--lr", 5e-4, "--warmup", 4, "--schedule", "linear"),
        *("--checkpoint-every", 0, *DECODING, *more),
    )


def on_the_task(folder: Path, steps: int, batch: int, everies: tuple[int, ...], dev: int) -> list[dict[str, Any]]:
    teacher, student, data = TASK / "teacher", TASK / "predistilled", TASK / "prompts.jsonl"
    prompts = steps * batch // SAMPLES
    start = folder / "prompts"
    # the prompts alone, with the fewest rollouts that the command makes: each run begins with a copy
    tool("rollout", "--student", TASK / "student", "--data", data, "--skip", 1500, "--limit", prompts,
         "--first", 1, *DECODING, "--cache", start)  # fmt: skip
    runs: list[dict[str, Any]] = []
    for every in everies:
        cache, out = folder / f"cache-{every}", folder / f"every-{every}"
        shutil.copytree(start, cache)
        found = learning(student, cache, out, steps, batch, "--teacher", teacher, "--refresh-every", every)
        runs.append({"name": "live (every step)" if every == 1 else f"every {every} steps", "learn": found, **found})
    cache, out = folder / "cache-offline", folder / "offline"
    made = tool("rollout", "--student", student, "--data", data, "--skip", 1500, "--limit", prompts,
                "--samples", SAMPLES, *DECODING, "--cache", cache)  # fmt: skip
    scored = tool("score", "--teacher", teacher, "--cache", cache)
    found = learning(student, cache, out, steps, batch)
    parts = (made, scored, found)
    runs.append(
        {
            "name": "offline",
            "rollout": made,
            "score": scored,
            "learn": found,
            "seconds": sum(p["seconds"] for p in parts),
            "cpu_seconds": sum(p["cpu_seconds"] for p in parts),
            "peak_bytes": found["peak_bytes"],
        }
    )
    outs = [*(folder / f"every-{every}" for every in everies), folder / "offline"]
    for entry, out in zip(runs, outs, strict=True):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        entry["step_seconds"] = float(np.median([line["seconds"] for line in lines[1:]]))
        entry["dev_return"] = dev_return(out / "student", teacher, TASK / "dev.jsonl", dev)
    runs.append({"name": "student before", "dev_return": dev_return(student, teacher, TASK / "dev.jsonl", dev)})
    return runs


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
    alone = run(sys.executable, __file__, "--alone", folder, "--steps", steps, "--batch-size", batch)
    return {"student-only": alone, "offline": offline, "live": live, "score": score}


def student_alone(folder: Path, steps: int, batch: int) -> None:
    """Load, AdamW, backward, save: what training this student takes without this tool's loop."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from ketchup_cache.lm.head import Head

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


def main() -> None:
    chosen = options(
        __doc__,
        steps=(64, "optimizer steps"),
        batch_size=(64, "rollouts per step"),
        dev=(500, "dev sentences for the return"),
        alone=("", "(used by the script itself)"),
    )
    if chosen.alone:
        student_alone(Path(chosen.alone), chosen.steps, chosen.batch_size)
        return
    steps = 4 if chosen.short else chosen.steps
    everies = (1, 4) if chosen.short else (1, 4, 16, 64)
    with tempfile.TemporaryDirectory() as temporary:
        runs = on_the_task(Path(temporary), steps, chosen.batch_size, everies, 50 if chosen.short else chosen.dev)
    live = runs[0]
    head = ("rollouts", "wall s", "CPU s", "live / this (wall)", "live / this (CPU)", "learn alone", "return on dev")
    rows = []
    for entry in runs[:-1]:
        entry["times_live"] = live["seconds"] / entry["seconds"]
        entry["times_live_cpu"] = live["cpu_seconds"] / entry["cpu_seconds"]
        entry["times_live_learn_alone"] = live["cpu_seconds"] / entry["learn"]["cpu_seconds"]
        rows.append(
            (
                entry["name"],
                f"{entry['seconds']:.0f}",
                f"{entry['cpu_seconds']:.0f}",
                f"{entry['times_live']:.1f}",
                f"{entry['times_live_cpu']:.1f}",
                f"{entry['times_live_learn_alone']:.1f}",
                f"{entry['dev_return']:.2f}",
            )
        )
    print(table(head, rows))
    print(f"\n{steps} steps of {chosen.batch_size} rollouts; student before: {runs[-1]['dev_return']:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        large = memory(Path(temporary), 2, 8)
    alone = large["student-only"]["peak_bytes"]
    print(
        "\n"
        + table(
            ("T5-small student, T5-base teacher", "peak MB", "of student-only", "wall s", "CPU s"),
            [
                (
                    name,
                    f"{entry['peak_bytes'] / 1e6:.0f}",
                    f"{entry['peak_bytes'] / alone:.2f}",
                    f"{entry['seconds']:.0f}",
                    f"{entry['cpu_seconds']:.0f}",
                )
                for name, entry in large.items()
            ],
        )
    )
    publish("live_teacher", chosen, steps=steps, batch_size=chosen.batch_size, runs=runs, large_models=large)


if __name__ == "__main__":
    main()
