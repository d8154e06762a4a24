"""Where the time of sampling goes, and what it could be: `generate` row by row, ours, early removal, CTranslate2.

    python benchmarks/rollouts.py [--prompts 16]

Random weights of T5-small's shape, realistic prompts, 4 samples of each. One in 25 ids ends a completion, so that
lengths are geometric with a mean near 25, cut at 64: random weights alone would never stop.

- plain: transformers' `generate`, every sample a row of its own with an encoder pass of its own, 8 at once, as
  they come.
- ours: `sample_completions` (each prompt encoded once for its samples), 64 at once.
- ours, sorted: the same, prompts sorted by length.
- removal: a decoding loop of 20 lines on the same model that drops finished rows from the batch each step.
- CTranslate2: float32 `Translator`, an engine of its own. It reports one score per completion, so the tokens' log-
  probabilities are recomputed by our model in one pass, which is part of its time.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import T5_SMALL, VOCAB, options, publish, sample, t5, table, timed
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ketchup_cache.lm.forward import Batch, completion_states
from ketchup_cache.lm.head import Head
from ketchup_cache.lm.sample import sample_completions
from ketchup_cache.store.manifest import Sampling
from ketchup_cache.types import Ragged

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


@torch.no_grad()
def removal(model: Any, prompts: Ragged, samples: int, greedy: bool) -> int:
    """Finished rows leave the batch, and with them their keys and values."""
    eos = torch.tensor(model.generation_config.eos_token_id)
    tokens, at_once = 0, max(1, 64 // samples)
    for start in range(0, len(prompts), at_once):
        part = prompts.slice(start, min(start + at_once, len(prompts)))
        mask = torch.from_numpy((np.arange(part.lengths.max()) < part.lengths[:, None]).astype(np.int64))
        ids = torch.from_numpy(part.padded().astype(np.int64))
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        encoded, mask = encoded.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        last = torch.zeros(len(encoded), 1, dtype=torch.long)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for _ in range(LIMIT):
            logits = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                attention_mask=mask,
                decoder_input_ids=last,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1, :VOCAB]
            last = logits.argmax(1, keepdim=True) if greedy else torch.multinomial(logits.softmax(1), 1)
            logits.logsumexp(1)  # what the log-probability costs
            tokens += len(last)
            going = ~torch.isin(last[:, 0], eos)
            if not going.all():
                keep = going.nonzero()[:, 0]
                if not len(keep):
                    break
                last, encoded, mask = last[keep], encoded[keep], mask[keep]
                cache.batch_select_indices(keep)
    return tokens


class Engine:
    """CTranslate2 with its own copy of the weights; behaviour log-probabilities recomputed by `model`."""

    def __init__(self, model: Any, folder: Path, threads: int) -> None:
        import ctranslate2
        from common import word_tokenizer

        self.model, self.head, tokenizer = model, Head.of(model, VOCAB), word_tokenizer(VOCAB + 28)
        if not (folder / "ct2").exists():
            model.save_pretrained(folder / "hf")
            tokenizer.save_pretrained(folder / "hf")
            ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
        self.words = tokenizer.convert_ids_to_tokens(range(VOCAB + 28))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.eos = [self.words[i] for i in model.generation_config.eos_token_id]
        self.translator = ctranslate2.Translator(
            str(folder / "ct2"), device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads
        )

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
    chosen = options(__doc__, prompts=(16, "prompts"), samples=(4, "completions of each when sampling"))
    model = t5(T5_SMALL)
    ends = np.random.default_rng(0).choice(np.arange(3, VOCAB), VOCAB // 25, replace=False)
    model.generation_config.eos_token_id = model.config.eos_token_id = [1, *map(int, ends)]
    n = 4 if chosen.short else chosen.prompts
    prompts = sample(0, n, samples=1).prompts.tokens
    by_length = prompts.take(np.argsort(prompts.lengths, kind="stable"))
    ways: dict[str, Any] = {"plain": plain, "ours": ours, "ours, sorted": lambda m, _, s, g: ours(m, by_length, s, g)}
    ways["removal"] = removal
    missing = None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for threads in (1, 2):
                ways[f"CTranslate2, {threads} threads"] = Engine(model, Path(temporary), threads)
        except Exception as error:  # it is optional, and its converter follows transformers at a distance
            missing = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"CTranslate2: not measured ({missing})", flush=True)
        results, rows = [], []
        for greedy in (True, False):
            samples = 1 if greedy else chosen.samples
            found = {}
            for name, way in ways.items():
                torch.manual_seed(0)
                wall, cpu, tokens = timed(lambda: way(model, prompts, samples, greedy))  # noqa: B023
                found[name] = {"seconds": wall, "cpu_seconds": cpu, "tokens": tokens}
                print(f"{name}: {tokens} tokens in {wall:.1f} s", file=sys.stderr, flush=True)
            for name, entry in found.items():
                rate, base = entry["tokens"] / entry["seconds"], found["plain"]["tokens"] / found["plain"]["seconds"]
                cpu_rate = entry["tokens"] / entry["cpu_seconds"]
                base_cpu = found["plain"]["tokens"] / found["plain"]["cpu_seconds"]
                entry |= {"of_plain": rate / base, "of_plain_cpu": cpu_rate / base_cpu}
                rows.append(
                    (
                        "greedy" if greedy else f"{samples} samples",
                        name,
                        f"{entry['tokens']:,}",
                        f"{rate:.0f}",
                        f"{entry['of_plain']:.2f}",
                        f"{cpu_rate:.0f}",
                        f"{entry['of_plain_cpu']:.2f}",
                    )
                )
            results.append({"greedy": greedy, "samples": samples, "ways": found})
    print(table(("", "way", "tokens", "tokens/s", "of plain", "tokens/CPU-s", "of plain, CPU"), rows))
    publish("rollouts", chosen, prompts=n, results=results, ctranslate2=missing or "measured")


if __name__ == "__main__":
    main()
