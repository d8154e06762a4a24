"""Tiny models, their tokenizers and prompts files, made on the spot: T5, and one model of each architecture."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = (
    "the a cat dog bird sees likes finds big small red old two three and who runs sleeps "
    "ka lo mi ta ne ru so pa ve di ko la me ti nu re su po va de 0 1 2 3 4 5 6 7 8 9 + - * / = << >> . ,"
).split()
VOCAB = 60
"""Tokens of the tokenizers below."""
ENDS = [1, 7, 11, 23, 40, 51]
"""A random model rarely writes the one EOS: with several, some rollouts end early, some late, some not."""

# -------------------------------------------------------------------------------------------------------- tokenizers


def make_tokenizer(words: list[str] | None = None):
    """T5-like, word by word: <pad> 0 (also decoder start), </s> 1 appended to every text, <unk> 2."""
    tokenizer = _word_level(words)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap_tokenizer(tokenizer, pad_token="<pad>")


def make_decoder_tokenizer(words: list[str] | None = None, **options):
    """Word by word; as GPT-2 and Qwen do, it adds nothing to a text. <pad> 0, </s> 1, <unk> 2, <s> 3."""
    tokenizer = _word_level(words)
    tokenizer.decoder = decoders.Fuse()
    return wrap_tokenizer(tokenizer, **options)


CHAT = (
    "{{ bos_token or '' }}{% for turn in messages %}<< {{ turn.role }} {{ turn.content }} >> {% endfor %}"
    "{% if add_generation_prompt %}<< assistant{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'assistant' %}<< assistant {% generation %}"
    "{{ turn.content }} </s>{% endgeneration %} {% else %}<< {{ turn.role }} {{ turn.content }} >> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<< assistant {% endif %}"
)
"""A template that ends the assistant's turn, and marks what it writes."""


def with_bos(tokenizer):
    """As Llama's and Gemma's: <s> before every text."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.convert_tokens_to_ids("<s>")
    single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


def chat_tokenizer(template: str | None = CHAT):
    tokenizer = with_bos(make_decoder_tokenizer([*WORDS, "user", "system", "assistant"]))
    tokenizer.chat_template = template
    return tokenizer


def train_byte_level(texts: list[str], vocab_size: int):
    """Byte-level BPE, so that every text is encoded without unknown tokens and decoded to itself; adds </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = {"vocab_size": vocab_size, "special_tokens": ["<pad>", "</s>", "<unk>"], "show_progress": False}
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**size, initial_alphabet=letters))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap_tokenizer(tokenizer, pad_token="<pad>")


def _word_level(words: list[str] | None) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, **options):
    options = {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


# ---------------------------------------------------------------------------------------------------------------- T5


def make_t5(version: str = "1.0", *, seed: int = 0, vocab_size: int = VOCAB, d_model: int = 32, scale: float = 1.0):
    """Random T5. "1.0": tied, scaled head, ReLU. "1.1" (FLAN): untied, unscaled head, gated GELU.

    `scale` widens the head so that the distribution is far from uniform and the largest logit is never a near tie.
    """
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=vocab_size, d_model=d_model, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.1,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, tie_word_embeddings=version == "1.0",
        feed_forward_proj="relu" if version == "1.0" else "gated-gelu", pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "shared" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
        if version != "1.0":  # transformers ties every fresh T5: give the head weights of its own
            model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab_size, d_model) * scale * 2 / d_model**0.5)
        else:
            model.shared.weight.mul_(3 * scale)
    return model


# ---------------------------------------------------------------------------------------------- other architectures

T5_SIZES = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "decoder_start_token_id": 1, "init_std": 0.4,
}  # fmt: skip
ENCODERS = {
    "mt5": ("MT5", T5_SIZES),
    "umt5": ("UMT5", T5_SIZES),
    "bart": ("Bart", BART),
    "marian": ("Marian", BART),
    "nllb-moe": ("NllbMoe", BART | {"num_experts": 2}),  # its encoder has an output class of its own
}
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
    # whose weights have other names, or other shapes, in the file than in memory
    "neox": ("GPTNeoX", SIZES | {"tie_word_embeddings": False}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "wide": ("Qwen2", SIZES | {"vocab_size": VOCAB + 12}),
}  # fmt: skip

ROPE = {"rope_theta": 100.0, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 4.0, 8.0, 16.0]}
STRETCHED = {
    "llama-dynamic": (
        "Llama",
        SIZES | {"max_position_embeddings": 16, "rope_parameters": ROPE | {"rope_type": "dynamic"}},
    ),
    "phi3-longrope": ("Phi3", SIZES | {"original_max_position_embeddings": 16, "rope_parameters": ROPE | LONGROPE}),
}
"""In which a row of more than 16 tokens stretches the positions of its whole batch."""


def make_decoder(family: str, *, seed: int = 0, attention: str | None = None, **options):
    """Random weights, wide enough that the distribution is far from uniform."""
    return _of_config(*(FAMILIES | STRETCHED)[family], transformers.AutoModelForCausalLM, seed, attention, options)


def make_model(family: str, *, ends: list[int] | None = None, **options):
    """Of ENCODERS, FAMILIES, STRETCHED, or "t5-1.0" and "t5-1.1". ends: the ids that end its completions."""
    if family in ENCODERS:
        model = _of_config(*ENCODERS[family], transformers.AutoModelForSeq2SeqLM, 0, None, options)
    else:
        t5 = family.removeprefix("t5-")
        model = make_t5(t5, **options) if family != t5 else make_decoder(family, **options)
    model.generation_config.eos_token_id = ends or model.generation_config.eos_token_id
    return model


def _of_config(name: str, settings: dict, kind, seed: int, attention: str | None, options: dict):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings | options)
    model = kind.from_config(config, attn_implementation=attention).eval()
    if name.endswith("MT5"):  # of which only the norms would matter otherwise
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, 0, 0.3)
    return model


# ------------------------------------------------------------------------------------------------------------- files


def save_model(folder: Path, version: str = "1.0", **options) -> Path:
    """A tiny T5 with its tokenizer in `folder`, as `from_pretrained` reads it."""
    return _save(folder, make_t5(version, **options), make_tokenizer())


def save_decoder(folder: Path, family: str = "qwen2", tokenizer=None, **options) -> Path:
    """The same of a decoder-only model."""
    return _save(folder, make_decoder(family, **options), tokenizer or make_decoder_tokenizer())


def _save(folder: Path, model, tokenizer) -> Path:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def write_prompts(path: Path, n: int = 8, *, seed: int = 0, longest: int = 9) -> Path:
    """A JSONL file of n different prompts of mixed lengths, with targets."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < n:
        seen.add(" ".join(rng.choices(WORDS[:18], k=rng.randint(2, longest))))
    lines = [json.dumps({"prompt": p, "target": " ".join(reversed(p.split()))}) for p in sorted(seen)]
    path.write_text("\n".join(lines) + "\n")
    return path
