"""Rollouts by a real vLLM on a CPU, beside our own sampler: speed, mismatch, and new weights.

    python -m benchmarks.engine --folder FOLDER [--dtypes float32,bfloat16] [--rounds 3] [--record]

FOLDER: as of `benchmarks.served`, whose environment and model it uses. Server and program share the cores that they
are given. The server gives log-probabilities of the distribution that it draws from (`processed_logprobs`).

- `speed`: completions a second, of the engine with the comparison, and of our own sampler; rounds in turn, median.
- `compare_s`: of the engine's seconds, those in which the weights here read its completions.
- `mismatch`: of plain sampling, and at temperature 0.7 with top-k 50 and top-p 0.9.
- `update`: seconds of handing over weights, and for weights that have moved by little: how far (root mean square of the
  log-probabilities), and whether a server that keeps the old ones is found out.
- `learn`: four steps with a refresh every second one, in float32.

`--record` writes what the server answers to one row, for the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks.common import ROOT, options, publish, table, timed, tool
from benchmarks.served import FORMS, NAME, THINGS, VLLM, set_up, vllm
from ketchup_cache.config.commands import RolloutConfig
from ketchup_cache.errors import ServerError
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.engine import Engine
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.types import TOKEN_DTYPE, Ragged, concatenated

PLAIN = Sampling(samples=4, max_new_tokens=16)
WARPED = PLAIN.model_copy(update={"temperature": 0.7, "top_k": 50, "top_p": 0.9})
MOVES = (1e-2, 1e-3, 1e-4)
"""Of the last norm's weights, a share of them."""


def updates(engine: Any, model: Any, folder: Path, fresh: Any) -> list[dict[str, Any]]:
    """fresh: draws a few completions, after which the engine knows where it was."""
    found = []
    for move in MOVES:
        fresh()
        prompts, kept, old = engine._kept
        before = engine._readings()
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + move)
        moved = float(((engine._own(prompts, kept, []) - old) ** 2).mean() ** 0.5)
        try:
            engine._require_arrived(before)
            noticed = False
        except ServerError:
            noticed = True
        write_s, _, _ = timed(partial(model.save_pretrained, folder))
        update_s, _, _ = timed(partial(engine.update, folder))
        found.append({"move": move, "nats": moved, "noticed": noticed, "write_s": write_s, "update_s": update_s})
    return found


def learnt(folder: Path, url: str) -> list[dict[str, Any]]:
    """The steps of a short run of `learn` by this server: of each refresh, seconds, and the mean ratio after it."""
    cache, out = folder / "engine-cache", folder / "engine-run"
    for old in (cache, out):
        shutil.rmtree(old, ignore_errors=True)
    common = ["--student", folder / NAME, "--cache", cache, "--samples", 2, "--max-new-tokens", 16, "--device", "cpu"]
    common += ["--student-url", url, "--student-name", NAME, "--in-flight", 8]
    tool("rollout", *common, "--data", folder / "prompts.jsonl", "--first", 2)
    tool("learn", *common, "--teacher", folder / "student", "--out", out, "--steps", 4, "--batch-size", 4, "--lr",
         "1e-5", "--refresh-every", 2, "--checkpoint-every", 0, "--save-limit", 0)  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "engine_s", "sample_s", "ratio_mean", "ess")} for line in lines]


def measured(engine: Any, model: Any, vocab: int, prompts: Ragged, rounds: int) -> dict[str, Any]:
    """Speed and mismatch."""
    compare, seconds = engine._own, list[float]()

    def own(*arguments: Any) -> Any:
        took, _, values = timed(partial(compare, *arguments))
        seconds.append(took)
        return values

    engine._own = own
    times, drawn = list[list[float]](), []
    for number in range(rounds):
        how = PLAIN.model_copy(update={"seed": number})
        by_engine, _, some = timed(partial(engine.sample, prompts, how, 0, abs))
        size: Any = {"first_prompt": 0, "batch": 64}
        here, _, _ = timed(partial(sample_completions, model, vocab, prompts, how, **size))
        times.append([by_engine, here])
        drawn.append(some)
    found = {"seconds": times, "compare_s": sum(seconds) / rounds, "tokens": sum(len(some.apart) for some in drawn)}
    of = {"plain": engine.mismatch(concatenated(drawn))}
    of["warped"] = engine.mismatch(engine.sample(prompts, WARPED, 0, abs))
    engine._own = compare
    speed = [statistics.median(len(prompts) * 4 / pair[i] for pair in times) for i in (0, 1)]
    mismatch = {name: one.model_dump(exclude={"engine"}) for name, one in of.items()}
    return found | {"speed": speed, "mismatch": mismatch}


def main() -> None:
    chosen = options(__doc__, folder=("../ketchup-served", "vLLM and models"), port=(8767, "of the server"),
                     dtypes=("float32,bfloat16", "of the servers"), rounds=(3, "of the speed"),
                     prompts=(12, "number of prompts, 4 rollouts each"), in_flight=(8, "requests at once"),
                     record=(False, "write the tests' fixture"))  # fmt: skip
    folder = Path(chosen.folder).resolve()
    python = set_up(folder)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    count, rounds = (4, 1) if chosen.short else (chosen.prompts, chosen.rounds)
    texts = [form.format(thing) for form in FORMS.split(";") for thing in THINGS.split(";")][:count]
    tokenizer = load_tokenizer(str(folder / NAME))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    prompts = Ragged.from_rows(tokenizer(texts)["input_ids"], TOKEN_DTYPE)
    found, rows = dict[str, Any](), []
    for dtype in chosen.dtypes.split(","):
        model = load_model(str(folder / NAME), device="cpu")
        with vllm(python, folder, chosen.port, dtype, "--logprobs-mode", "processed_logprobs") as url:
            given = {"student": str(folder / NAME), "data": "-", "cache": folder / "none", "device": "cpu"}
            given |= {"student_url": url, "student_name": NAME, "in_flight": chosen.in_flight, "max_mismatch": 1}
            engine = Engine(RolloutConfig(**given), model, len(tokenizer))
            if chosen.record and dtype == "float32":
                record(url, model, engine, prompts[0].tolist())
            found[dtype] = one = measured(engine, model, len(tokenizer), prompts, rounds)
            one["update"] = updates(
                engine, model, folder / "moved", partial(engine.sample, prompts.slice(0, 2), PLAIN, 0, abs)
            )
            if dtype == "float32":
                one["learn"] = learnt(folder, url)
        for line in one.get("learn", ()):
            figure = "engine_s {engine_s}, ratio_mean {ratio_mean}".format(**line)
            rows.append((dtype, f"step {line['step']} of learn", figure))
        rows.append((dtype, "completions a second: engine, own sampler", "{:.2f}, {:.2f}".format(*one["speed"])))
        for name, m in one["mismatch"].items():
            rows.append((dtype, f"mismatch, {name}", f"{m['mean']:.2g} nats, at most {m['largest']:.2g}"))
        for m in one["update"]:
            figure = f"{m['noticed']}; written in {m['write_s']:.1f} s, taken and checked in {m['update_s']:.1f} s"
            rows.append((dtype, f"weights moved by {m['nats']:.1e} nats: old ones noticed", figure))
        print(table(("server", "what", "figure"), rows), flush=True)
    publish("engine", chosen, server=VLLM, rollouts=len(prompts) * 4, in_flight=chosen.in_flight, **found)


def record(url: str, model: Any, engine: Any, ids: list[int]) -> None:
    """One row as it is asked for, with the model's own log-probabilities."""
    engine._sampling = PLAIN
    body = engine._asking() | {"model": NAME, "prompt": ids, "seed": 5, "max_tokens": 8}
    answer = httpx2.post(f"{url}/completions", json=body, timeout=None).json()
    tokens = answer["choices"][0]["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    own = logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()
    content = {"server": VLLM, "asked": body, "answer": answer, "in_process": own}
    (ROOT / "tests" / "fixtures" / "vllm-completion.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
