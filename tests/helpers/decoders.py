"""Tiny decoder-only models made on the spot, one of each way that architectures differ, and a plain pass over a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.helpers.tiny import WORDS

VOCAB = 60
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1,
    "initializer_range": 0.4,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.4,
}  # fmt: skip
FAMILIES = {
    "qwen2": ("Qwen2", SIZES),
    "qwen2-tied": ("Qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", SIZES),
    "mistral-window": ("Mistral", SIZES | {"sliding_window": 4}),
    # query_pre_attn_scalar small, caps low: each of the two must matter
    "gemma2": ("Gemma2", SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
                                 "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.25}),
    "granite": ("Granite", SIZES | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "bloom-alibi": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
                              "bos_token_id": 3, "eos_token_id": 1, "initializer_range": 0.4}),
    "wide": ("Qwen2", SIZES | {"vocab_size": VOCAB + 12}),
}  # fmt: skip


def make_decoder(family: str, *, seed: int = 0, attention: str | None = None, **options):
    """Random weights, wide enough that the distribution is far from uniform."""
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings | options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_decoder_tokenizer(words: list[str] | None = None, **options):
    """Word-level, as GPT-2's and Qwen's are otherwise: nothing is added to a text. <pad> 0, </s> 1, <unk> 2, <s> 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False, **options
    )


def save_decoder(folder: Path, family: str = "qwen2", tokenizer=None, **options) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_decoder(family, **options).save_pretrained(folder)
    (tokenizer or make_decoder_tokenizer()).save_pretrained(folder)
    return folder


def plain_row_logits(model, prompt, completion) -> np.ndarray:
    """[T + 1, V] float64, of one row alone: no padding, no batch, no cache. Row t has seen prompt and a_1 … a_t."""
    ids = torch.tensor([[*map(int, prompt), *map(int, completion)]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].double().numpy()
