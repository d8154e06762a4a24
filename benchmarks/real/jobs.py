"""The jobs of the tables on real text, each of them a few of the program's commands. Every one returns its record."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.real import models
from benchmarks.real.place import Place, tool
from benchmarks.real.settings import (
    BASE,
    BATCH,
    DECODING,
    DEV,
    GRADIENT_BATCH,
    KEEP_TOP,
    LEARN,
    OTHER_SEEDS,
    PRETRAIN,
    REFRESH,
    REUSE,
    STEPS,
    TASKS,
    TEACHER,
    TEACHER_AGAIN,
    Row,
)

KEPT = ("examples", "steps", "seconds", "loss_first", "loss_last", "score_s", "sample_s", "load_s", "train_s", "eval_s")
"""Of a report of training."""


def data(place: Place) -> dict[str, Any]:
    """The splits, in the direction of the task; the prompts without labels apart."""
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "dev", "test"):
        lines = (place.source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        rows[split] = [{"prompt": row[place.task.prompt], "target": row[place.task.target]} for row in read]
    few = place.task.labelled
    rows |= {"labelled": rows["train"][:few], "unlabelled": rows["train"][few:] if few else rows["train"]}
    for name, part in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (place / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if place.task.like:
        shutil.copytree(place.like() / "tokenizer", place / "tokenizer")
    else:
        models.make_tokenizer([place / "train.jsonl"], place / "tokenizer")
    return {name: len(part) for name, part in rows.items()}


def base(place: Place) -> dict[str, Any]:
    """What all students begin with, as a pre-trained model: it has learned to take noise out of the sentences of both
    languages, and has seen no translation."""
    if place.task.like:
        shutil.copytree(place.like() / "base", place / "base", symlinks=True)
        return place.like().records()["base"]
    rng = random.Random(0)
    with (place / "noise.jsonl").open("w", encoding="utf-8") as file:
        for row in map(json.loads, (place / "train.jsonl").read_text(encoding="utf-8").splitlines()):
            for text in (row["prompt"], row["target"]):
                pair = {"prompt": models.noised(text, rng), "target": text}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    models.make_t5("student", 0, place / "tokenizer", place / "untrained")
    report = tool("pretrain", model=place / "untrained", data=place / "noise.jsonl", out=place / "base", **BASE)
    return {name: report[name] for name in KEPT if name in report}


def teacher(place: Place) -> dict[str, Any]:
    """In two stages: dropout from the start keeps a model of this size from learning which word belongs to which.

    Raises RuntimeError where a task has that of another, which is not made yet.
    """
    if place.task.base:
        base = replace(place, task=TASKS[place.task.base])
        if "teacher" not in base.records():
            raise RuntimeError(f"{place.task.name} has the teacher of {base.task.name}: make that with --task first")
        shutil.copytree(base / "teacher", place / "teacher", symlinks=True, dirs_exist_ok=True)
        return base.records()["teacher"]
    models.make_t5("teacher", 0, place / "tokenizer", place / "teacher-untrained")
    given = {"data": place / "train.jsonl", "eval_data": place / "dev.jsonl"}
    first = tool("pretrain", model=place / "teacher-untrained", out=place / "teacher-begun", **given, **TEACHER)
    again = TEACHER | TEACHER_AGAIN
    report = tool("pretrain", model=place / "teacher-begun/best", out=place / "teacher", **given, **again)
    began = trained(place / "teacher-begun", first)
    return {"begun": began, "pretrain": trained(place / "teacher", report), **evaluated(place, "teacher")}


def trained(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What the results keep of a run of training: `curve` has each evaluation on the dev set, with how many tokens the
    student had been trained on by then."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = [0, *accumulate(line.get("action_tokens", 0) for line in lines)]
    curve = []
    for line in map(json.loads, (out / "dev.jsonl").read_text(encoding="utf-8").splitlines()):
        kept = {name: line[name] for name in ("step", "best", "length_mean", "finished")}
        curve.append({**kept, **line["metrics"], "tokens": tokens[line["step"]]})
    return {**{name: report[name] for name in KEPT if name in report}, "tokens": tokens[-1], "curve": curve}


def evaluated(place: Place, model: str) -> dict[str, Any]:
    """On both splits, with the return under the teacher, and the outputs beside the model."""
    found = {}
    for split in ("dev", "test"):
        outputs = place / f"{model}/{split}-outputs.jsonl"
        given = {"teacher": place / "teacher/best", "metrics": "bleu,chrf", "outputs": outputs, **DECODING}
        report = tool("evaluate", model=place / f"{model}/best", data=place / f"{split}.jsonl", **given)
        kept = {name: report[name] for name in ("examples", "length_mean", "finished")}
        found[split] = {**report["metrics"], **kept, "return": report["returns"]["mean"]}
    return found


def outputs(place: Place) -> dict[str, Any]:
    """The teacher's greedy outputs for the labelled prompts, with what the divergences need of its logits."""
    best = place / "teacher/best"
    given = {"greedy": True, "data": place / "labelled.jsonl", "cache": place / "outputs", **DECODING}
    made = tool("rollout", student=best, **given)
    return {"rollout": made, "score": tool("score", teacher=best, cache=place / "outputs", keep_top=KEEP_TOP)}


def start(place: Place, seed: int, lr: float, epochs: int, name: str) -> dict[str, Any]:
    """The base, pre-distilled on the teacher's outputs in an order of its own."""
    given = {"cache": place / "outputs", "seed": seed, "lr": lr, "epochs": epochs, **PRETRAIN, **DEV}
    given |= {"eval_data": place / "dev.jsonl", "out": place / name, "max_new_tokens": 64, "rollout_batch": 256}
    return trained(place / name, tool("pretrain", model=place / "base/best", **given))


def begun(place: Place, seed: int) -> dict[str, Any]:
    """A cache with the unlabelled prompts, and the first rollouts of a start."""
    given = {"data": place / "unlabelled.jsonl", "first": BATCH * REFRESH // REUSE, "seed": seed, **DECODING}
    return tool("rollout", student=place / f"starts/{seed}/best", cache=place / f"begun/{seed}", **given)


def offline(place: Place, seed: int) -> dict[str, Any]:
    """A cache with as many rollouts of a start as a run learns from, scored once for all methods."""
    cache, n = place / f"offline/{seed}", BATCH * STEPS // REUSE
    given = {"data": place / "unlabelled.jsonl", "first": n, "limit": n, "seed": seed, **DECODING}
    made = tool("rollout", student=place / f"starts/{seed}/best", cache=cache, **given)
    return {"rollout": made, "score": tool("score", teacher=place / "teacher/best", cache=cache, keep_top=KEEP_TOP)}


def gradient(place: Place, seed: int) -> list[dict[str, Any]]:
    """Experiment A: the estimators on a start's own rollouts."""
    given = {"student": place / f"starts/{seed}/best", "cache": place / f"offline/{seed}", "tail": "jump"}
    report = tool("analyze", gradient=True, batch_size=GRADIENT_BATCH, **given)
    kept = ("name", "cosine", "agreement", "norm", "snr", "length")
    return [{name: one[name] for name in kept} for one in report["estimators"]]


def variance(place: Place, seed: int) -> dict[str, Any]:
    """Bias and variance of the return of a start's first token (the paper's Figure 2), by K and the other weights."""
    cache = place / f"variance/{seed}"
    given = {"data": place / "unlabelled.jsonl", "limit": 64, "samples": 32, "seed": seed, **DECODING}
    tool("rollout", student=place / f"starts/{seed}/best", cache=cache, **given)
    tool("score", teacher=place / "teacher/best", cache=cache)
    (found,) = tool("analyze", cache=cache, tail="jump")["policies"]
    kept = ("variance", "variance_se", "bias", "bias_se")
    by_k = [{name: one[name] for name in ("k", *kept)} for one in found["by_k"]]
    by_weights = [{name: one[name] for name in ("weights", "lam", *kept)} for one in found["by_weights"]]
    return {"covariance": found["covariance"], "by_k": by_k, "by_weights": by_weights}


def continued(place: Place, name: str, seed: int, *, lr: float, outputs: int, times: int = 1, test: bool) -> Any:
    """SeqKD from a start for as many completions as `learn` trains on: on the outputs it has, and on `outputs` more.

    New outputs are greedy for prompts that have none, and samples where all have one. times: how many times as many
    completions.
    """
    cache, best = place / f"{name}-cache", place / "teacher/best"
    if not cache.exists():
        shutil.copytree(place / "outputs", cache)
    began, made = time.monotonic(), {}
    if outputs:
        given = {"data": place / "unlabelled.jsonl", "first": outputs, "limit": outputs, "seed": seed, **DECODING}
        made = tool("rollout", student=best, cache=cache, greedy=place.task.labelled is not None, **given)
    known = place.records()["outputs"]["rollout"]
    epochs = max(1, round(times * STEPS * BATCH / (known["rollouts"] + outputs)))
    given = {"cache": cache, "seed": seed, "lr": lr, "epochs": epochs, **PRETRAIN, **DEV, "batch_size": BATCH}
    given |= {
        "eval_every": STEPS // 5,
        "eval_data": place / "dev.jsonl",
        "out": place / name,
        "max_new_tokens": 64,
        "rollout_batch": 256,
    }
    report = trained(place / name, tool("pretrain", model=place / f"starts/{seed}/best", **given))
    report["tokens"] = epochs * (known["tokens"] + made.get("tokens", 0))
    seconds, size = round(time.monotonic() - began, 1), bytes_of(cache)
    shutil.rmtree(cache)
    kept = {"outputs": outputs, "epochs": epochs, "lr": lr, "seed": seed, "learn": report, "seconds": seconds}
    kept |= {"bytes": size, "generated": made.get("tokens", 0), "generated_s": made.get("seconds", 0)}
    return kept | (evaluated(place, name) | last(place, name) if test else {})


def run(place: Place, name: str, row: Row, seed: int, *, test: bool) -> dict[str, Any]:
    """`learn` from a start, in a copy of its cache; on the test split only where settings are not being chosen."""
    out, cache, best = place / name, place / f"{name}-cache", place / "teacher/best"
    another = OTHER_SEEDS[(seed + 1) % len(OTHER_SEEDS)]
    folders = {"refreshed": f"begun/{seed}", "outputs": "outputs", "offline": f"offline/{seed}"}
    if not cache.exists():
        shutil.copytree(place / folders.get(row.source, f"offline/{another}"), cache)
    both = row.options.get("method") in ("js", "tvd") or "anchor" in row.options
    if both:
        tool("merge", cache, place / "outputs", into=cache)
    given = {**LEARN, **row.options, "seed": seed, "eval_data": place / "dev.jsonl", "out": out}
    given |= {"teacher": best} if row.source == "refreshed" else {"refresh_every": None, "reuse": None}
    began = time.monotonic()
    report = tool("learn", student=place / f"starts/{seed}/best", cache=cache, **given)
    seconds, size = round(time.monotonic() - began, 1), bytes_of(cache)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ess = [line["ess"] for line in lines if line["ess"] is not None]
    record = {"options": dict(row.options), "source": row.source, "seed": seed, "learn": trained(out, report)}
    known = place.records()["outputs"]["score"]["tokens"] if both else 0
    scored = tool("info", cache)["completion_tokens"] - known if row.source == "refreshed" else 0
    record |= {
        "seconds": seconds,
        "bytes": size,
        "scored": scored,
        "refreshes": sum(line["refreshed"] for line in lines),
    }
    record |= {"ess": sum(ess) / len(ess) if ess else None, "alarms": [alarm["name"] for alarm in report["alarms"]]}
    record |= evaluated(place, name) | last(place, name) if test else {}
    shutil.rmtree(cache)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return record


def last(place: Place, name: str) -> dict[str, Any]:
    """The last checkpoint on the test split, beside the best."""
    given = {"data": place / "test.jsonl", "metrics": "bleu,chrf", **DECODING}
    report = tool("evaluate", model=place / f"{name}/last", **given)
    return {"last": {**report["metrics"], "length_mean": report["length_mean"]}}


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
