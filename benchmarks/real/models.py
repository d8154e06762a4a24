"""The tokenizer and the untrained models of the tables on real text: T5s and decoder-only models of our own making."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 3000
"""Byte-pair units, of both languages together."""

DROPPED, MOVED = 0.15, 3
"""Of the noise that the students' base learns to take out: share of words, and places that one moves by."""

SIZES: dict[str, Mapping[str, Any]] = {
    "teacher": {"d_model": 192, "d_kv": 48, "d_ff": 512, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.15},
    "student": {"d_model": 56, "d_kv": 14, "d_ff": 112, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
}


def make_tokenizer(files: list[Path], out: Path) -> None:
    """A joint byte-level BPE of the prompts and targets of `files`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for file in files:
            for line in file.open(encoding="utf-8"):
                row = json.loads(line)
                yield row["prompt"]
                yield row["target"]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def noised(text: str, rng: random.Random) -> str:
    """Words left out, and the others a little out of order."""
    words = [word for word in text.split() if rng.random() > DROPPED]
    places = sorted(range(len(words)), key=lambda place: place + rng.uniform(0, MOVED))
    return " ".join(words[place] for place in places)


def make_t5(size: str, seed: int, tokenizer: Path, out: Path) -> None:
    """An untrained T5 of one of the SIZES."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        num_decoder_layers=SIZES[size]["num_layers"],
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        decoder_start_token_id=0,
        **SIZES[size],
    )
    T5ForConditionalGeneration(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
