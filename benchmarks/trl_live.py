"""This tool against TRL's DistillationTrainer, decoder-only: time, memory and return at equal steps on equal rollouts.

    python -m benchmarks.trl_live --trl-python PATH [--seeds 0,1,2] [--add]

PATH: the Python of an environment with TRL (`python -m venv trl && trl/bin/pip install trl`); TRL is no dependency of
this project. Without it the rest is run. The models are made first, which takes minutes, and kept (decoder_pair.py).

- TRL: on-policy distillation with a live teacher; the student's samples, reverse KL to the teacher's distribution of
  every token.
- live, every N: `learn` with K = 4, new rollouts at every N-th step, scored by a teacher that stays in memory;
  `reverse-kl`: `learn --method reverse-kl`, the same loss as TRL's, off 64 logits of every token.
- offline: `rollout`, `score`, `learn`, on as many rollouts of the start policy, or on fewer that are used several
  times. `learning alone` is what a second run on the same cache costs.

Equal for all: student, teacher, optimizer steps, rollouts per step, length limit, AdamW and its schedule. Each with
what did best for it on the dev split with other prompts (log.md): TRL and reverse KL with one sample of each prompt,
K = 4 with eight and a leave-one-out baseline; learning rates (timed_run.py).
Times are without start-up and reading models. Return: mean G₁ of greedy outputs on the test split under the teacher,
from `evaluate`. Times are of the first seed, returns of all. `--add --seeds 1,2 --ways trl,live` adds runs to the
results file; `--add --test 0` takes the times again and keeps the returns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, held, merged, options, publish, run, table
from benchmarks.decoder_pair import FOLDER, MAX_NEW_TOKENS, PREDISTILLED_ON, TASK, TEMPLATE, Pair, pair
from benchmarks.timed_run import HEAD, Way, by, rows

WAYS = (
    "trl@5e-4,trl@2e-3,reverse-kl:live@2e-3,reverse-kl:4@2e-3,reverse-kl:16x4@2e-3,reverse-kl:offline@2e-3,"
    "reverse-kl:offlinex4@2e-3,live,4,16x4,offline@1e-4,offlinex4@1e-4,offlinex16@1e-4"
)
SAMPLES = 8
OPTIMIZER = {"lr": 5e-4, "warmup": 4, "weight_decay": 0.01}


def prompts_for(seed: int, count: int) -> list[str]:
    """Different prompts that the student was not pre-distilled on, others for each seed."""
    lines = (TASK / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    known = set(texts[:PREDISTILLED_ON])
    new = [text for text in dict.fromkeys(texts) if text not in known]
    start = seed * count
    if start + count > len(new):
        raise SystemExit(f"seed {seed}: {start + count} prompts wanted of {len(new)}: lower --steps or the seed")
    return [TEMPLATE.replace("{prompt}", text) for text in new[start : start + count]]


def written(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def quality(model: Path, teacher: Path, limit: int, split: str) -> dict[str, float]:
    words = ("evaluate", "--model", model, "--teacher", teacher, "--data", TASK / f"{split}.jsonl",
             "--template", TEMPLATE, "--metrics", "exact", "--limit", limit, "--max-new-tokens", MAX_NEW_TOKENS,
             "--rollout-batch", 256, "--json")  # fmt: skip
    command = [sys.executable, "-m", "ketchup_cache", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    return {
        "return": found["returns"]["mean"],
        "return_se": found["returns"]["se"],
        "exact": found["metrics"]["exact"],
        "length": found["length_mean"],
    }


def trl(
    word: str, folder: Path, models: Pair, chosen: argparse.Namespace, seed: int, prompts: Path
) -> tuple[dict[str, Any], Path]:
    lr = float(word.partition("@")[2] or OPTIMIZER["lr"])
    out, times = folder / word, folder / "times.json"
    found: dict[str, Any] = run(
        *(chosen.trl_python, Path(__file__).parent / "trl_runner.py", "--student", models.student),
        *("--teacher", models.teacher, "--prompts", prompts, "--out", out, "--times", times, "--beta", 1.0),
        *("--steps", chosen.steps, "--batch-size", chosen.batch_size, "--max-new-tokens", MAX_NEW_TOKENS),
        *("--lr", lr, "--warmup", OPTIMIZER["warmup"], "--weight-decay", OPTIMIZER["weight_decay"]),
        *("--seed", seed),
    )
    found |= json.loads(times.read_text())
    if found["steps"] != chosen.steps:
        raise SystemExit(f"TRL took {found['steps']} optimizer steps instead of {chosen.steps}")
    return {"name": f"TRL {found['trl']}, lr {lr:g}", **found}, out / "student"


def runs_of(folder: Path, models: Pair, chosen: argparse.Namespace, seed: int, ways: list[str]) -> list[dict[str, Any]]:
    count = chosen.steps * chosen.batch_size
    prompts = written(folder / "prompts.jsonl", prompts_for(seed, count))
    data = {"data": prompts, "limit": count}
    learning = {
        "student": models.student,
        "seed": seed,
        "steps": chosen.steps,
        "batch_size": chosen.batch_size,
        "k": 4,
        "samples": SAMPLES,
        "baseline": "leave-one-out",
        "schedule": "linear",
        "checkpoint_every": 0,
        **OPTIMIZER,
        "max_new_tokens": MAX_NEW_TOKENS,
        "rollout_batch": 256,
    }
    runs = []
    for way in ways:
        if way.startswith("trl"):
            found, student = trl(way, folder, models, chosen, seed, prompts)
        else:
            found, student = by(Way.of(way), folder, models.teacher, models.untrained, data, learning)
        print(f"seed {seed}, {found['name']}: {found['work']['seconds']:.1f} s", file=sys.stderr, flush=True)
        measured = quality(student, models.teacher, chosen.test, chosen.split) if chosen.test else {}
        runs.append({**found, "seed": seed, **measured})
    return runs


def has_trl(python: str) -> bool:
    if not python:
        print("TRL is not run: name the Python of an environment that has it with --trl-python", file=sys.stderr)
        return False
    try:
        done = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"--trl-python {python}: {error.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        print(f"TRL is not run: {python} can't import it ({reason})", file=sys.stderr)
    return done.returncode == 0


def report(runs: list[dict[str, Any]], rollouts: int) -> str:
    """Times of the first seed, returns of all."""
    first = min(entry["seed"] for entry in runs)
    timed = [entry for entry in runs if entry["seed"] == first]
    lines = rows(timed, rollouts)
    for line in lines:
        alike = [entry for entry in runs if entry["name"] == line[0].removesuffix(", learning alone")]
        same = [entry for entry in alike if "return" in entry]
        if not same:
            line += ["", ""]
            continue
        returns = [entry["return"] for entry in same]
        spread = f" ± {np.std(returns, ddof=1):.2f}" if len(returns) > 1 else ""
        line += [f"{np.mean(returns):.2f}{spread}", f"{np.mean([entry['exact'] for entry in same]):.1f}"]
    return table((*HEAD, "return", "exact %"), lines)


def parameters(model: Path) -> int:
    from safetensors.numpy import load_file

    return sum(tensor.size for tensor in load_file(model / "model.safetensors").values())


def compare(chosen: argparse.Namespace, models: Pair) -> None:
    ways = [way for way in chosen.ways.split(",") if not way.startswith("trl") or has_trl(chosen.trl_python)]
    record = held("trl_live", chosen) if chosen.add else {}
    runs: list[dict[str, Any]] = record.get("runs", [])
    for seed in map(int, chosen.seeds.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            new = runs_of(Path(temporary), models, chosen, seed, ways)
        runs = merged(runs, new, ("name", "seed"))
    before = record.get("before") or quality(models.student, models.teacher, chosen.test or 500, chosen.split)
    print(report(runs, chosen.steps * chosen.batch_size))
    print(f"\n{chosen.steps} steps of {chosen.batch_size} rollouts; student before: return {before['return']:.2f}, "
          f"exact {before['exact']:.1f} %", flush=True)  # fmt: skip
    sizes = {"teacher": parameters(models.teacher), "student": parameters(models.student)}
    publish("trl_live", chosen, steps=chosen.steps, batch_size=chosen.batch_size, parameters=sizes, before=before,
            runs=runs)  # fmt: skip


def main() -> None:
    chosen = options(
        __doc__,
        trl_python=("", "Python of an environment with TRL"),
        steps=(64, "optimizer steps"),
        batch_size=(64, "rollouts per step"),
        test=(500, "sentences for the return; 0: times alone"),
        split=("test", "of which split they are; dev: to choose settings"),
        seeds=("0", "seeds, with commas"),
        ways=(WAYS, "what to run; a number: steps between new rollouts; x: uses of each; @: learning rate"),
        models=(str(FOLDER), "where the models are, or go"),
        add=(False, "add to the results file, or replace in it what is run again"),
    )
    if not chosen.short:
        compare(chosen, pair(Path(chosen.models)))
        return
    chosen.steps, chosen.test, chosen.ways = 4, 50, "trl,live,reverse-kl:4,offlinex4"
    with tempfile.TemporaryDirectory() as temporary:
        compare(chosen, pair(Path(temporary), 1, 5, short=True))


if __name__ == "__main__":
    main()
