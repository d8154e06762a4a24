"""Where the time of sampling goes, and what it could be: `generate` row by row, ours on `generate`, ours, CTranslate2.

    python -m benchmarks.rollouts [--prompts 16] [--ways "on generate,ours"] [--tasks]

Random weights of T5-small's shape, realistic prompts, 4 samples of each. One in 25 ids ends a completion, so that
lengths are geometric with a mean near 25, cut at 64: random weights alone would never stop.

- plain: transformers' `generate`, every sample a row of its own with an encoder pass of its own, 8 at once, as
  they come.
- on generate: `sample_completions` as it is for models that `rollouts/decode.py` does not know: each prompt encoded
  once for its samples, 64 at once, every row computed until the last has ended.
- on its own steps: `rollouts/decode.py` with the model's own forward pass, as it is for everything but T5: prompts
  sorted by length, rows that have ended leave.
- ours: `sample_completions` as a T5 gets it, with the steps of `rollouts/t5_decode.py`.
- CTranslate2: float32 `Translator`, an engine of its own. It reports one score per completion, so the tokens' log-
  probabilities are recomputed by our model in one pass, which is part of its time. `converted` adds what each refresh
  of the policy would cost it: writing the weights, converting and loading them.

With `--tasks` instead: the shipped students of `translate` and `reason` (with the calculator), 4 samples of each of
256 prompts, three of these ways in turn, five times; the tokens are compared.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ketchup_cache.rollouts.decode as decode_module
import ketchup_cache.rollouts.sample as sample_module
from benchmarks.common import ROOT, T5_SMALL, VOCAB, options, publish, sample, t5, table, timed
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.types import Ragged, Rollouts

LIMIT = 64


def plain(model: Any, prompts: Ragged, samples: int, greedy: bool) -> int:
    tokens = 0
    rows = np.repeat(np.arange(len(prompts)), samples)
    rows = np.random.default_rng(0).permutation(rows)
    for start in range(0, len(rows), 8):
        part = prompts.take(rows[start : start + 8])
        mask = np.arange(part.lengths.max()) < part.lengths[:, None]
        out = model.generate(
            input_ids=torch.from_numpy(part.padded().astype(np.int64)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            do_sample=not greedy,
            top_k=None if greedy else 0,
            max_new_tokens=LIMIT,
        )[:, 1:].numpy()
        tokens += int(real_lengths(out, model.generation_config.eos_token_id).sum())
    return tokens


def real_lengths(tokens: np.ndarray, eos: list[int]) -> np.ndarray:
    ended = np.isin(tokens, eos)
    return np.where(ended.any(1), ended.argmax(1) + 1, tokens.shape[1])


def ours(model: Any, prompts: Ragged, samples: int, greedy: bool) -> int:
    sampling = Sampling(samples=samples, greedy=greedy, max_new_tokens=LIMIT)
    made = sample_completions(model, VOCAB, prompts, sampling, first_prompt=0, batch=64)
    return len(made.completions.values)


@contextmanager
def without(module: Any, name: str) -> Iterator[None]:
    """As if no model were known to what `name` decides about."""
    own = getattr(module, name)
    setattr(module, name, lambda _: False)
    try:
        yield
    finally:
        setattr(module, name, own)


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "on generate": lambda: without(sample_module, "can_decode"),
    "on its own steps": lambda: without(decode_module, "can_step"),
    "ours": nullcontext,
}


def ours_in(name: str) -> Callable[[Any, Ragged, int, bool], int]:
    def way(model: Any, prompts: Ragged, samples: int, greedy: bool) -> int:
        with WAYS[name]():
            return ours(model, prompts, samples, greedy)

    return way


def tasks(chosen: Any) -> None:
    """The shipped students, all ways in turn."""
    results, rows = {}, []
    for task, longest in (("translate", 32), ("reason", 48)):
        found = in_turn_on(task, longest, *((64, 2) if chosen.short else (256, 5)))
        results[task] = found
        seconds, same = found["cpu_seconds"], f"{found['same']} of {found['rollouts']}"
        times = [f"{seconds[name]:.2f} ({seconds['on generate'] / seconds[name]:.2f})" for name in WAYS]
        rows.append((task, f"{found['mean_length']:.1f}", found["longest"], *times, same))
    head = ("task", "mean length", "longest", *(f"CPU-s {name} (ratio)" for name in WAYS), "same completions")
    print(table(head, rows))
    publish("rollouts_tasks", chosen, benchmark="benchmarks/rollouts.py --tasks", results=results)


def in_turn_on(task: str, longest: int, prompts_of_each: int, repeats: int) -> dict[str, Any]:
    folder = str(ROOT / "data" / task / "predistilled")
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    with (ROOT / "data" / task / "prompts.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in itertools.islice(lines, prompts_of_each)]
    prompts = Ragged.from_rows(tokenizer(texts)["input_ids"], np.int32)
    sampling = Sampling(samples=4, max_new_tokens=longest, calculator=task == "reason")
    calculator = Calculator(tokenizer, task) if sampling.calculator else None

    def once() -> Rollouts:
        return sample_completions(
            model, len(tokenizer), prompts, sampling, first_prompt=0, batch=64, calculator=calculator
        )

    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    made: dict[str, Rollouts] = {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            with way():
                _, seconds, made[name] = timed(once)
            cpu[name].append(seconds)
    every = [[row.tolist() for row in rollouts.completions] for rollouts in made.values()]
    lengths = made["ours"].completions.lengths
    return {
        "cpu_seconds": {name: min(values) for name, values in cpu.items()},
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "same": sum(all(row == one for one in others) for row, *others in zip(*every, strict=True)),
        "rollouts": len(lengths),
    }


class Engine:
    """CTranslate2 with its own copy of the weights; behaviour log-probabilities recomputed by `model`."""

    def __init__(self, model: Any, folder: Path, threads: int) -> None:
        import ctranslate2

        from benchmarks.common import word_tokenizer

        self.model, self.head, tokenizer = model, Head.of(model, VOCAB + 28), word_tokenizer(VOCAB + 28)
        began = time.perf_counter(), time.process_time()
        model.save_pretrained(folder / "hf")
        tokenizer.save_pretrained(folder / "hf")
        ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"), force=True)
        self.words = tokenizer.convert_ids_to_tokens(range(VOCAB + 28))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.eos = [self.words[i] for i in model.generation_config.eos_token_id]
        self.translator = ctranslate2.Translator(
            str(folder / "ct2"), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
        )
        self.refresh = time.perf_counter() - began[0], time.process_time() - began[1]

    def __call__(self, model: Any, prompts: Ragged, samples: int, greedy: bool) -> int:
        found = self.translator.translate_batch(
            [[self.words[i] for i in row] for row in prompts],
            beam_size=1,
            num_hypotheses=1 if greedy else samples,
            sampling_topk=1 if greedy else 0,
            max_decoding_length=LIMIT,
            max_batch_size=16,
            end_token=self.eos,
            return_end_token=True,
        )
        rows = [[self.ids[w] for w in words] for result in found for words in result.hypotheses]
        completions = Ragged.from_rows(rows, np.int32)
        index = np.repeat(np.arange(len(prompts)), 1 if greedy else samples)
        if not greedy:
            with torch.no_grad():
                states = completion_states(self.model, Batch(prompts, index, completions))
                self.head.log_prob(states, torch.from_numpy(completions.values).long())
        return len(completions.values)


def main() -> None:
    chosen = options(
        __doc__,
        prompts=(16, "prompts"),
        samples=(4, "completions of each when sampling"),
        ways=("", "only these, comma-separated; ratios are to the first"),
        tasks=(False, "the shipped students instead"),
    )
    if chosen.tasks:
        tasks(chosen)
        return
    model = t5(T5_SMALL)
    ends = np.random.default_rng(0).choice(np.arange(3, VOCAB), VOCAB // 25, replace=False)
    model.generation_config.eos_token_id = model.config.eos_token_id = [1, *map(int, ends)]
    n = 4 if chosen.short else chosen.prompts
    prompts = sample(0, n, samples=1).prompts.tokens
    ways: dict[str, Any] = {"plain": plain, **{name: ours_in(name) for name in WAYS}}
    missing, wanted = None, [name.strip() for name in chosen.ways.split(",") if name.strip()]
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for threads in (1, 2) if not wanted or "CTranslate2" in chosen.ways else ():
                ways[f"CTranslate2 on {threads} thread(s)"] = Engine(model, Path(temporary), threads)
        except Exception as error:  # it is optional, and its converter follows transformers at a distance
            missing = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"CTranslate2: not measured ({missing})", flush=True)
        ways = {name: ways[name] for name in wanted or ways}
        first = next(iter(ways))
        results, rows = [], []
        for greedy in (True, False):
            samples = 1 if greedy else chosen.samples
            found = {}
            for name, way in ways.items():
                torch.manual_seed(0)
                wall, cpu, tokens = timed(lambda: way(model, prompts, samples, greedy))  # noqa: B023
                found[name] = {"seconds": wall, "cpu_seconds": cpu, "tokens": tokens}
                if isinstance(way, Engine):
                    more = {"seconds": wall + way.refresh[0], "cpu_seconds": cpu + way.refresh[1], "tokens": tokens}
                    found[f"{name}, converted"] = more
                print(f"{name}: {tokens} tokens in {wall:.1f} s", file=sys.stderr, flush=True)
            for name, entry in found.items():
                rate, base = entry["tokens"] / entry["seconds"], found[first]["tokens"] / found[first]["seconds"]
                cpu_rate = entry["tokens"] / entry["cpu_seconds"]
                base_cpu = found[first]["tokens"] / found[first]["cpu_seconds"]
                entry |= {"of_first": rate / base, "of_first_cpu": cpu_rate / base_cpu}
                rows.append(
                    (
                        "greedy" if greedy else f"{samples} samples",
                        name,
                        f"{entry['tokens']:,}",
                        f"{rate:.0f}",
                        f"{entry['of_first']:.2f}",
                        f"{cpu_rate:.0f}",
                        f"{entry['of_first_cpu']:.2f}",
                    )
                )
            results.append({"greedy": greedy, "samples": samples, "ways": found})
    print(table(("", "way", "tokens", "tokens/s", f"of {first}", "tokens/CPU-s", f"of {first}, CPU"), rows))
    publish("rollouts", chosen, prompts=n, results=results, ctranslate2=missing or "measured")


if __name__ == "__main__":
    main()
