"""Tiny models, tokenizers and caches made on the spot, shared by the tests."""

from __future__ import annotations

from pathlib import Path

WORDS = (
    "the a cat dog bird sees likes finds big small red old two three and who runs sleeps "
    "ka lo mi ta ne ru so pa ve di ko la me ti nu re su po va de 0 1 2 3 4 5 6 7 8 9 + - * / = << >> . ,"
).split()


def make_tokenizer(words: list[str] | None = None):
    """T5-like word-level tokenizer: <pad> 0 (also decoder start), </s> 1 appended to every text, <unk> 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_t5(
    version: str = "1.0", *, seed: int = 0, vocab_size: int | None = None, d_model: int = 32, scale: float = 1.0
):
    """Random T5. "1.0": tied, scaled head, ReLU. "1.1" (FLAN): untied, unscaled head, gated GELU.

    `scale` widens the head so that the distribution is far from uniform and the largest logit is never a near tie.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size or len(WORDS) + 3,
        d_model=d_model,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.1,
        feed_forward_proj="relu" if version == "1.0" else "gated-gelu",
        tie_word_embeddings=version == "1.0",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "shared" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
        if version != "1.0":  # transformers ties every fresh T5: give the head weights of its own
            model.lm_head.weight = torch.nn.Parameter(
                torch.randn(config.vocab_size, d_model) * scale * 2 / d_model**0.5
            )
        else:
            model.shared.weight.mul_(3 * scale)
    return model


def assert_bfloat16_gradient(rounded: dict, exact: dict) -> None:
    """That a gradient is float32 of bfloat16 products: near the exact one as a whole, and not it."""
    import torch

    assert rounded.keys() == exact.keys()
    assert {g.dtype for g in rounded.values()} == {torch.float32}
    flat, plain = (torch.cat([grads[name].flatten() for name in exact]) for grads in (rounded, exact))
    error = float((flat - plain).norm() / plain.norm())
    assert 2**-12 < error < 2**-3, error  # a product is rounded by 2**-9; these wide random weights make more of it


def save_model(folder: Path, version: str = "1.0", **options) -> Path:
    """A tiny T5 with its tokenizer in `folder`, as `from_pretrained` reads it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_t5(version, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_prompts(path: Path, n: int = 8, *, seed: int = 0, longest: int = 9) -> Path:
    """A JSONL file of n different prompts of mixed lengths, with targets."""
    import json
    import random

    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < n:
        seen.add(" ".join(rng.choices(WORDS[:18], k=rng.randint(2, longest))))
    lines = [json.dumps({"prompt": p, "target": " ".join(reversed(p.split()))}) for p in sorted(seen)]
    path.write_text("\n".join(lines) + "\n")
    return path
