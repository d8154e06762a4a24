"""Groups of options that several commands share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ketchup_cache.config.base import Config, Positive, TokensOrAuto

Normalization = Literal["raw", "centred", "logprob"]
Tail = Literal["one-step", "jump"]
Unfinished = Literal["drop", "bootstrap", "zero"]
Dtype = Literal["float32", "bfloat16"]


class DeviceOptions(Config):
    device: str = "auto"
    """Where models run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    trust_remote_code: bool = False
    """Let a model's repository run its own Python code on this machine."""


class DataOptions(Config):
    data: str
    """Prompts: a .jsonl, .csv or .parquet file, or a Hugging Face dataset (owner/name or owner/name:config)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    prompt_field: str = "prompt"
    """Column that holds the prompt; translation.en is the part `en` of the column `translation`."""
    target_field: str = "target"
    """Column that holds the reference."""
    template: str = "{prompt}"
    """Text given to the model. {prompt} stands for the prompt's text."""
    skip: int = Field(default=0, ge=0)
    """Leave out the first so many rows."""
    limit: int = Field(default=0, ge=0)
    """Use only so many rows. 0: all."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt the model is given."""
    long_prompts: Literal["refuse", "truncate", "drop"] = "refuse"
    """What to do with a longer one: stop, cut it at the end (EOS is kept), or leave it out."""
    chat: bool = False
    """Wrap the prompt as a user turn with the tokenizer's chat template, and leave the assistant's turn open."""
    system: str = ""
    """With --chat: text of a system turn before it."""

    @model_validator(mode="after")
    def _whole_turns(self) -> DataOptions:
        if self.system and not self.chat:
            raise ValueError("system is a turn of a chat: set --chat too, or put the text into --template")
        if self.chat and self.long_prompts == "truncate":
            raise ValueError("chat with long_prompts truncate would cut off the end of the turn: use refuse or drop")
        return self


class SamplingOptions(Config):
    samples: Positive = 1
    """Completions per prompt."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature. 1, with no top-k and top-p, is the policy itself (Algorithm 1)."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens. 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """Sample from the smallest set of tokens with this much probability. 1: from all."""
    max_new_tokens: Positive = 64
    """Longest completion. A rollout that reaches it without EOS is unfinished."""
    seed: int = Field(default=0, ge=0)
    """Seed of all sampling. The same seed gives the same rollouts."""
    rollout_batch: Positive = 64
    """Completions generated at once."""
    calculator: bool = False
    """Compute what stands between << and = (GSM8K's annotations) and write the result for the model."""

    @model_validator(mode="after")
    def _greedy_is_one_sample(self) -> SamplingOptions:
        if self.greedy and self.samples > 1:
            raise ValueError("greedy gives the same completion every time: set --samples to 1")
        return self


class ScoringOptions(Config):
    dtype: Dtype = "float32"
    """Precision of the teacher's body. The head and its reductions always run in float32."""
    batch_tokens: TokensOrAuto = "auto"
    """Largest batch of the teacher, in tokens: prompts once each, and completions. auto: what fits into memory."""
    device_map: str | None = None
    """Spread a large teacher over devices: auto, balanced, sequential (through accelerate)."""


class ReturnOptions(Config):
    k: Positive = 4
    """Steps per jump. 1 is LLMR; 2 to 8 did best in the paper."""
    tail: Tail = "one-step"
    """The last K steps: one-step (Algorithm 1) or jump over the end (Eq. 7)."""
    normalization: Normalization = "logprob"
    """Subtracted from all logits of a state: nothing (raw), their mean (centred), their logsumexp (logprob)."""
    unfinished: Unfinished = "bootstrap"
    """Rollouts cut at the length limit: bootstrap from the teacher's value there, zero after the cut, or drop."""


class StepOptions(Config):
    """An optimizer step, whatever it learns from."""

    warmup: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Clip the gradient's norm."""
    micro_batch_tokens: Positive = 16384
    """Largest micro-batch, in tokens. Memory, not results, depends on it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the body's products; bfloat16 by autocast. Weights, gradients, head, loss and optimizer stay in float32."""
