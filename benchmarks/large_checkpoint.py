"""A FLAN-T5-XL-shaped checkpoint (3B parameters, bfloat16, sharded safetensors) through `score`, on a CPU.

    python -m benchmarks.large_checkpoint [--rollouts 8]        # 6 GB of disk, 15 minutes
    python -m benchmarks.large_checkpoint --short               # a small model in as many shards

Random weights, made here. `score` runs in a process of its own, with its defaults apart from `--dtype bfloat16`, on
made-up prompts (log-normal around 180 tokens) and completions (25 ± 8), 4 of each prompt. Prints its peak memory beside
the size of the weights, and its time, most of which may be reading and hashing the checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import FLAN_T5_XL, commit_rollouts, options, publish, run, sample, t5, table, word_tokenizer
from ketchup_cache import open_cache
from ketchup_cache.models.fingerprint import tokenizer_info

SMALL = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def main() -> None:
    chosen = options(
        __doc__,
        rollouts=(8, "completions to score"),
        folder=(tempfile.gettempdir(), "where the checkpoint is made and deleted"),
    )
    shape, shard = (SMALL, "1MB") if chosen.short else (FLAN_T5_XL, "2GB")
    batch = sample(0, chosen.rollouts)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(temporary)
        torch.set_default_dtype(torch.bfloat16)
        model = t5(shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        torch.set_default_dtype(torch.float32)
        parameters = model.num_parameters()
        model.save_pretrained(folder / "teacher", max_shard_size=shard)
        del model
        tokenizer = word_tokenizer()
        tokenizer.save_pretrained(folder / "teacher")
        shards = sorted((folder / "teacher").glob("*.safetensors"))
        cache = open_cache(folder / "cache", create=True)
        commit_rollouts(cache, batch, tokenizer=tokenizer_info(tokenizer, "t5"))
        found = run(
            *(sys.executable, "-m", "ketchup_cache", "score", "--teacher", folder / "teacher"),
            *("--cache", folder / "cache", "--dtype", "bfloat16", "--device", "cpu", "--json"),
        )
        scored = json.loads(found.pop("output"))
        del scored["teacher"]  # a temporary folder
        weights = sum(file.stat().st_size for file in shards)
    print(f"{parameters / 1e6:,.1f}M parameters in {len(shards)} shards, {weights / 2**30:.2f} GiB\n")
    row = (len(batch), f"{found['peak_bytes'] / 2**30:.2f}", f"{found['peak_bytes'] / weights:.2f}",
           f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.0f}")  # fmt: skip
    print(table(("rollouts", "peak GiB", "of the weights", "wall s", "CPU s"), [row]))
    publish("large_checkpoint", chosen, parameters=parameters, shards=len(shards), weights_bytes=weights,
            rollouts=len(batch), scored=scored, **found)  # fmt: skip


if __name__ == "__main__":
    main()
