"""Scoring speed, memory and exactness: `Teacher.score` against the plain way, in one run.

    python -m benchmarks.scoring [--model small|base|decoder] [--gsm8k FOLDER] [--only time|memory|overlap]

`--only` measures a part again and keeps what the results file holds of the others, of times too: those of other text,
numbers of rollouts, and completions a prompt (`--samples`).

The plain way is what public code does: every rollout a row of its own with an encoder pass of its own, random batches
of 8 padded to their longest, logits [B, T, V], then gather and max. Random weights of T5's shapes; the values of both
are compared. Prompts log-normal around 180 tokens, completions 25 ± 8; or, with a folder that holds GSM8K's
train.jsonl and test.jsonl, its questions and solutions, in the tokens of a BPE of 8,000 that is trained on them.

- completion tokens per second, in turn, medians, and their ratio; the rate of our operations (`needed_operations`) as a
  share of what a plain matrix product of 2048 × 2048 reaches in the same run;
- peak memory above the weights of a batch of 8 with the longest prompts, each way in a process of its own;
- the share of the teacher's passes in the wall time of the whole `score` command's work (reading, hashing, writing).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    QWEN2_SMALL,
    T5_BASE,
    T5_SMALL,
    VOCAB,
    commit_rollouts,
    fingerprint,
    forget_peak,
    held,
    made_up_rollouts,
    merged,
    needed_operations,
    options,
    peak,
    publish,
    qwen2,
    run,
    sample,
    t5,
    table,
    timed,
    word_tokenizer,
)
from ketchup_cache import open_cache
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.provenance import TeacherInfo, TokenizerInfo
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged, Rollouts

MODELS = {"small": partial(t5, T5_SMALL), "base": partial(t5, T5_BASE), "decoder": partial(qwen2, QWEN2_SMALL)}


def teacher_of(model: Any) -> Teacher:
    info = TeacherInfo(name="random", fingerprint=fingerprint("t"), dtype="float32")
    return Teacher(model, info, TokenizerInfo(name="t5", fingerprint=fingerprint("w"), vocab_size=VOCAB))


@torch.no_grad()
def plain_way(model: Any, prompts: Ragged, rollouts: Rollouts, at_once: int = 8) -> dict[str, np.ndarray]:
    """q and max_q of all completion tokens, rows end to end. at_once: rows of a batch."""
    order = np.random.default_rng(1).permutation(len(rollouts))
    rows: dict[str, list] = {"q": [None] * len(rollouts), "max_q": [None] * len(rollouts)}
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        inputs, completions = prompts.take(rollouts.prompt_index[batch]), rollouts.completions.take(batch)
        targets = torch.from_numpy(completions.padded().astype(np.int64)).to(model.device)
        if not model.config.is_encoder_decoder:
            whole = Ragged.from_rows((np.append(*pair) for pair in zip(inputs, completions, strict=True)), np.int64)
            mask = np.arange(whole.lengths.max()) < whole.lengths[:, None]
            logits = model(
                input_ids=torch.from_numpy(whole.padded()), attention_mask=torch.from_numpy(mask), use_cache=False
            ).logits[..., :VOCAB]
            q_all = logits[:, :-1].gather(2, torch.from_numpy(whole.padded())[:, 1:, None])[..., 0]
            for place, row in enumerate(batch):
                part = slice(inputs.lengths[place] - 1, whole.lengths[place] - 1)
                rows["q"][row] = q_all[place, part].numpy()
                rows["max_q"][row] = logits[place, part].amax(1).numpy()
            continue
        mask = np.arange(inputs.lengths.max()) < inputs.lengths[:, None]
        logits = model(
            input_ids=torch.from_numpy(inputs.padded().astype(np.int64)).to(model.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(model.device),
            decoder_input_ids=torch.cat([targets.new_zeros(len(batch), 1), targets[:, :-1]], dim=1),
            use_cache=False,
        ).logits[..., :VOCAB]
        q, max_q = logits.gather(2, targets[..., None])[..., 0].cpu(), logits.amax(2).cpu()
        for place, row in enumerate(batch):
            for name, values in (("q", q), ("max_q", max_q)):
                rows[name][row] = values[place, : completions.lengths[place]].double().numpy()
    return {name: np.concatenate(values) for name, values in rows.items()}


def gsm8k(folder: Path, rollouts: int, samples: int) -> tuple[Ragged, Rollouts]:
    """Questions, and as completions of each its solution, cut to different ends so that no two are the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def texts(split: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()])
    trainer = trainers.BpeTrainer(vocab_size=8_000, show_progress=False)
    tokenizer.train_from_iterator((text for row in texts("train") for text in row.values()), trainer)
    used = texts("test")[: -(-rollouts // samples)]
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(len(used)), samples)[:rollouts]
    answers = [np.array(encoding.ids) for encoding in tokenizer.encode_batch([row["answer"] for row in used])]
    prompts = Ragged.from_rows((e.ids for e in tokenizer.encode_batch([row["question"] for row in used])), np.int32)
    ends = rng.uniform(0.3, 1, rollouts)
    completions = (answers[i][: max(int(end * len(answers[i])), 1)] for i, end in zip(index, ends, strict=True))
    return prompts, made_up_rollouts(index, Ragged.from_rows(completions, np.int32))


def matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    a = torch.randn(size, size)
    return max(2 * size**3 / timed(lambda: a @ a)[0] for _ in range(repeats))


def speed(chosen: Any, model: Any, name: str, samples: int, repeats: int) -> dict[str, Any]:
    if name == "gsm8k":
        prompts, rollouts = gsm8k(Path(chosen.gsm8k), chosen.rollouts, samples)
    else:
        made = sample(0, chosen.rollouts, samples=samples)
        prompts, rollouts = made.prompts.tokens, made.rollouts
    teacher = teacher_of(model)
    tokens = len(rollouts.completions.values)
    operations = needed_operations(model, prompts.lengths.sum(), tokens)
    teacher.score(prompts, rollouts, rows=np.arange(samples), batch_tokens=chosen.batch_tokens)  # warm up
    ours, plain, rates = [], [], []
    for _ in range(repeats):
        rates.append(matrix_rate())
        seconds, _, scores = timed(lambda: teacher.score(prompts, rollouts, batch_tokens=chosen.batch_tokens))
        ours.append(seconds)
        rates.append(matrix_rate())
        seconds, _, plainly = timed(lambda: plain_way(model, prompts, rollouts))
        plain.append(seconds)
    difference = max(float(np.abs(getattr(scores, key) - values).max()) for key, values in plainly.items())
    found = {
        "data": name,
        "samples": samples,
        "rollouts": chosen.rollouts,
        "repeats": repeats,
        "tokens": tokens,
        "prompt_tokens": int(prompts.lengths.sum()),
        "ours_seconds": statistics.median(ours),
        "plain_seconds": statistics.median(plain),
        "largest_difference": difference,
        "largest_logit": float(np.abs(plainly["max_q"]).max()),
        "flops": operations / statistics.median(ours),
        "matrix_flops": statistics.median(rates),
    }
    found["times_plain"] = found["plain_seconds"] / found["ours_seconds"]
    found["share_of_matrix_rate"] = found["flops"] / found["matrix_flops"]
    print(f"{name}, n = {samples}: {found['times_plain']:.2f} times the plain way", file=sys.stderr, flush=True)
    return found


def longest_batch(model: Any, way: str) -> None:
    """Prints the peak bytes above the weights for 8 rollouts of two prompts of 1024 tokens, completions of 64."""
    rng = np.random.default_rng(0)
    prompts = Ragged.from_rows([rng.integers(3, VOCAB, 1024) for _ in range(2)], np.int32)
    completions = Ragged.from_rows([rng.integers(3, VOCAB, 64) for _ in range(8)], np.int32)
    rollouts = made_up_rollouts(np.repeat(np.arange(2), 4), completions)
    teacher = teacher_of(model)

    def call(prompts: Ragged, rollouts: Rollouts) -> None:
        if way == "plain":
            plain_way(model, prompts, rollouts)
        else:
            teacher.score(prompts, rollouts, batch_tokens=4096)

    few = Ragged.from_rows([row[:8] for row in prompts], np.int32)
    call(few, made_up_rollouts(np.arange(2), Ragged.from_rows([row[:8] for row in list(completions)[:2]], np.int32)))
    before = forget_peak()
    call(prompts, rollouts)
    print(json.dumps(peak() - before))


def memory(shape: str) -> dict[str, int]:
    found = {}
    for way in ("plain", "ours"):
        words = [sys.executable, "-m", "benchmarks.scoring", "--model", shape, "--only", f"memory-of-{way}"]
        found[way] = int(json.loads(run(*words)["output"]))
    return found


def overlap(model: Any, rollouts: int) -> dict[str, float]:
    """A cache of rollouts scored by `Scorer`, with the time inside the teacher's passes measured beside it."""
    from ketchup_cache.scoring.score import Scorer

    inside: list[float] = []
    plain_score = Teacher.score

    def measured(self: Teacher, *arguments: Any, **named: Any) -> Any:
        seconds, _, scores = timed(lambda: plain_score(self, *arguments, **named))
        inside.append(seconds)
        return scores

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "teacher")
        word_tokenizer().save_pretrained(folder / "teacher")
        from ketchup_cache.models.fingerprint import tokenizer_info
        from ketchup_cache.models.load import load_tokenizer

        tokenizer = tokenizer_info(load_tokenizer(str(folder / "teacher")), "t5")
        commit_rollouts(open_cache(folder / "cache", create=True), sample(0, rollouts), tokenizer=tokenizer)
        scorer = Scorer(ScoreConfig(teacher=str(folder / "teacher"), cache=folder / "cache", device="cpu"))
        scorer.stay()
        Teacher.score = measured  # type: ignore[method-assign]
        try:
            seconds, _, report = timed(lambda: scorer.ensure(open_cache(folder / "cache")))
        finally:
            Teacher.score = plain_score  # type: ignore[method-assign]
    return {"seconds": seconds, "in_teacher": sum(inside), "share": sum(inside) / seconds, "tokens": report.tokens}


def main() -> None:
    chosen = options(
        __doc__,
        rollouts=(64, "completions of each measurement (a multiple of 4)"),
        batch_tokens=(4096, "largest batch of Teacher.score"),
        model=("small", "small, base (T5) or decoder (Qwen2)"),
        gsm8k=("", "folder with GSM8K's test.jsonl"),
        samples=("1,4", "completions a prompt, with commas"),
        only=("", "time, memory or overlap"),
        repeats=(3, "measurements of each"),
    )
    model = MODELS[chosen.model]()
    if chosen.only.startswith("memory-of-"):
        longest_batch(model, chosen.only.removeprefix("memory-of-"))
        return
    wanted = [chosen.only] if chosen.only else ["time", "memory", "overlap"]
    name = f"scoring_{chosen.model}"
    before = held(name, chosen) if chosen.only else {}
    results: dict[str, Any] = {key: before[key] for key in ("speed", "memory", "overlap") if key in before}
    results |= {"model": chosen.model, "batch_tokens": chosen.batch_tokens}
    print(f"{chosen.model}: {model.num_parameters() / 1e6:.0f}M weights, {torch.get_num_threads()} threads\n")
    if "time" in wanted:
        kinds = ["made up", *(["gsm8k"] if chosen.gsm8k else [])]
        found = [
            speed(chosen, model, kind, samples, 1 if chosen.short else chosen.repeats)
            for kind in kinds
            for samples in map(int, chosen.samples.split(","))
        ]
        results["speed"] = merged(results.get("speed", []), found, ("data", "samples", "rollouts"))
        head = ("data", "rollouts", "n", "tokens/s", "plain", "times plain", "of matrix rate", "largest difference")
        rows = [
            (
                f["data"],
                f["rollouts"],
                f["samples"],
                f"{f['tokens'] / f['ours_seconds']:,.0f}",
                f"{f['tokens'] / f['plain_seconds']:,.0f}",
                f"{f['times_plain']:.2f}",
                f"{f['share_of_matrix_rate']:.0%} of {f['matrix_flops'] / 1e9:.0f} GFLOP/s",
                f"{f['largest_difference']:.1e} of {f['largest_logit']:.1f}",
            )
            for f in found
        ]
        print(table(head, rows) + "\n", flush=True)
    if "memory" in wanted:
        results["memory"] = bytes_ = memory(chosen.model)
        print(
            f"8 rollouts of 64 tokens, prompts of 1,024: {bytes_['ours'] / 1e6:.0f} MB above the weights, "
            f"the plain way {bytes_['plain'] / 1e6:.0f} MB: {bytes_['ours'] / bytes_['plain']:.0%}\n",
            flush=True,
        )
    if "overlap" in wanted:
        results["overlap"] = found_overlap = overlap(model, 8 if chosen.short else 2 * chosen.rollouts)
        print(f"the teacher's share of the wall time of scoring a cache: {found_overlap['share']:.1%}")
    publish(name, chosen, benchmark="benchmarks/scoring.py", **results)


if __name__ == "__main__":
    main()
