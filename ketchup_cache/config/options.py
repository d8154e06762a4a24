"""Groups of options that several commands share. The text under a field is its help; that under a group is its title.

Parts of the program take the group that they need, so a test or a script gives them `LossOptions(k=2)` and no more.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ketchup_cache.config.methods import METHODS, Method
from ketchup_cache.config.values import (
    Above0,
    Baseline,
    Config,
    Count,
    MetricList,
    Normalization,
    NotNegative,
    Positive,
    RougeTokenizer,
    Shard,
    chat_arguments,
    own_function,
    split_list,
)


class DeviceOptions(Config):
    """Device"""

    device: str = "auto"
    """Where models run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    trust_remote_code: bool = False
    """Let a model's repository run its own Python code on this machine."""


class ShardOptions(Config):
    """Several machines"""

    shard: Shard | None = None
    """Do one part of the work, as 3/16: the third of sixteen. Which rows that is depends on the rows alone, so tasks
    on any machines do all of it, none twice, without a coordinator. slurm: the part of this task of its array."""

    def part_of(self, rows: int) -> range:
        """Of so many rows, those of this part."""
        part, parts = map(int, (self.shard or "1/1").split("/"))
        return range(rows * (part - 1) // parts, rows * part // parts)


class RayOptions(ShardOptions, DeviceOptions):
    """Several machines"""

    engine: Literal["local", "ray"] = "local"
    """Where the work is done. local: in this process, or in those of torchrun. ray: by workers on a Ray cluster, which
    may come and go (docs/machines.md)."""
    ray_address: str = ""
    """With --engine ray: address of the cluster. Default: that in RAY_ADDRESS, or the one that runs on this machine, or
    a new one of this machine."""
    ray_workers: Count = 0
    """With --engine ray: number of workers. 0: as many as the cluster has room for, at any time."""
    ray_cpus: Positive = 1
    """With --engine ray: CPUs of a worker, and its threads."""
    ray_gpus: NotNegative | None = None
    """With --engine ray: GPUs of a worker; a part of one where workers share it. Default: 1 where the cluster has
    any."""

    @model_validator(mode="after")
    def _ray_is_there(self) -> RayOptions:
        given = [name for name in self.model_fields_set if name.startswith("ray_")]
        if given and self.engine != "ray":
            raise ValueError(f"{min(given)} is of workers on a cluster: give --engine ray too, or leave it out")
        if self.engine == "ray" and find_spec("ray") is None:
            raise ValueError("engine ray needs the package ray: pip install 'ketchup-cache[ray]'")
        return self


class PromptOptions(Config):
    """Prompts"""

    prompt_field: str = "prompt"
    """Column of the prompts. translation.en is the part `en` of the column `translation`."""
    target_field: str = "target"
    """Column of the references: texts, or lists of texts where there are several. Without it, also `targets` and
    `completion`."""
    messages_field: str = "messages"
    """Column of conversations: lists of messages, each with a role and a content. A row that has one, or whose prompt
    is such a list, is rendered by the tokenizer's chat template. Empty: no such column is looked for."""
    template: str = "{prompt}"
    """Text given to the model. {prompt} is replaced by the prompt."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt, in tokens."""
    long_prompts: Literal["refuse", "truncate", "drop"] = "refuse"
    """What happens to a longer prompt. refuse: an error. truncate: the longest text of the data in it is cut at its
    end, the template stays. drop: it is left out."""
    chat: bool = False
    """Wrap each prompt as a user turn by the tokenizer's chat template, and open the assistant's turn."""
    system: str = ""
    """Text of a system turn before the prompt; of a conversation, where it has none of its own. Needs --chat."""
    template_arg: Annotated[tuple[str, ...], BeforeValidator(chat_arguments)] = ()
    """Argument of the chat template, as enable_thinking=false; may be given several times. The value is JSON, else
    text."""
    prefill: str = ""
    """Text that the assistant's turn begins with. It is a part of the prompt: it is not learned, and is in no output;
    references that begin with it are taken without it."""

    @model_validator(mode="after")
    def _whole_turns(self) -> PromptOptions:
        if self.system and not self.chat:
            raise ValueError("system is a turn of a chat: set --chat too, or put the text into --template")
        if self.chat and self.long_prompts == "truncate":
            raise ValueError("chat with long_prompts truncate would cut off the end of the turn: use refuse or drop")
        return self


class DataOptions(PromptOptions):
    """Prompts"""

    data: str
    """Prompts: a .jsonl, .json, .csv or .parquet file, or a Hugging Face dataset (owner/name or owner/name:config)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    skip: Count = 0
    """Number of rows to leave out at the start."""
    limit: Count = 0
    """Number of rows to use. 0: all."""


class GreedyOptions(Config):
    """Greedy outputs"""

    max_new_tokens: Positive = 64
    """Longest output, in tokens."""
    rollout_batch: Positive = 64
    """Outputs generated at once."""
    calculator: bool = False
    """Compute what stands between << and = (annotations of GSM8K) and write the result for the model."""


class RougeOptions(Config):
    """ROUGE"""

    rouge_tokenizer: RougeTokenizer | None = None
    """What ROUGE counts: ascii (words of English, stemmed, as in papers), unicode (words of any script: runs of letters
    and digits) or characters (single ones, for scripts without spaces). Without it, ascii where that keeps 95 % of the
    letters of the references, otherwise unicode."""


class DevOptions(PromptOptions, GreedyOptions, RougeOptions):
    """Dev set"""

    eval_data: str = ""
    """Dev set: a file or dataset with prompts and references. The model is evaluated on it while it trains, from the
    start on, and the best one is kept in best/."""
    eval_split: str = "validation"
    """Split of the dev set, if it is a Hugging Face dataset."""
    eval_every: Count = 0
    """Optimizer steps between evaluations. 0: a tenth of the run."""
    eval_limit: Count = 500
    """Number of rows of the dev set to use. 0: all."""
    metric: Annotated[MetricList, Field(min_length=1)] = ("bleu",)
    """Metrics on the dev set, comma-separated; the first one chooses the best model. rouge1, rouge2, rougeL, bleu,
    chrf, ter, exact, accuracy (final answers, GSM8K), loss (cross-entropy of the references), return (needs --teacher),
    or a function of your own as package.module:function."""
    patience: Count = 0
    """Stop after this many evaluations without a better one. 0: never."""

    @model_validator(mode="after")
    def _dev_set_is_usable(self) -> DevOptions:
        if not self.eval_data and (given := {"eval_every", "metric", "patience"} & self.model_fields_set):
            raise ValueError(f"{min(given)} is about the dev set: give --eval-data too, or leave it out")
        if "rouge" in self.metric:
            raise ValueError("metric rouge is three: choose rouge1, rouge2 or rougeL")
        if "return" in self.metric and not (getattr(self, "teacher", None) or getattr(self, "teacher_url", "")):
            raise ValueError("metric return needs `learn --teacher`, which scores in this process: or choose another")
        return self

    @property
    def dev_data(self) -> DataOptions | None:
        """The dev set as `text.read` takes it; None without one."""
        return self.data_options(self.eval_data, self.eval_split, self.eval_limit) if self.eval_data else None

    def data_options(self, data: str, split: str, limit: int = 0) -> DataOptions:
        """Other data, its prompts in the same form."""
        given = PromptOptions.model_fields.keys() & self.model_fields_set
        same = {name: getattr(self, name) for name in given}
        return DataOptions(data=data, split=split, limit=limit, **same)


class SamplingOptions(Config):
    """Sampling"""

    samples: Positive = 1
    """Completions per prompt."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    temperature: Above0 = 1.0
    """Sampling temperature. 1, without top-k and top-p, is the policy itself (Algorithm 1)."""
    top_k: Count = 0
    """Sample from the k most likely tokens. 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """Sample from the smallest set of tokens with this probability. 1: from all."""
    max_new_tokens: Positive = 64
    """Longest completion, in tokens. A rollout that reaches it without EOS is unfinished."""
    seed: Count = 0
    """Seed of all sampling. The same seed gives the same rollouts."""
    rollout_batch: Positive = 64
    """Completions generated at once. Of an engine (--student-url): that are compared with the weights here at once."""
    calculator: bool = False
    """Compute what stands between << and = (annotations of GSM8K) and write the result for the model."""

    @model_validator(mode="after")
    def _greedy_is_one_sample(self) -> SamplingOptions:
        if self.greedy and self.samples > 1:
            raise ValueError("greedy gives the same completion every time: set --samples to 1")
        return self


class SelectOptions(Config):
    """Choice of models in a cache"""

    scored_by: str | None = None
    """Teacher whose scores are used: its name or the start of its fingerprint. Default: the only one."""
    policy: str | None = None
    """Policy whose rollouts are used: its name or the start of its fingerprint. Default: all; of `learn`, those of the
    weights given as --student where there are any."""


class ReturnOptions(Config):
    """Returns"""

    tail: Literal["one-step", "jump"] = "one-step"
    """Return of the last K tokens. one-step: step by step (Algorithm 1). jump: over the end (Eq. 7)."""
    normalization: Normalization = "logprob"
    """Subtracted from all logits of a state. raw: nothing. centred: their mean. logprob: their logsumexp. advantage:
    the largest."""
    unfinished: Literal["drop", "bootstrap", "zero"] = "bootstrap"
    """Rollouts cut at the length limit. bootstrap: the teacher's value follows. zero: nothing follows. drop: left
    out."""

    @property
    def of_returns(self) -> dict[str, Any]:
        """As `method.returns.rollout_returns` takes them."""
        return {"tail": self.tail, "normalization": self.normalization, "unfinished": self.unfinished}


class StudentOptions(Config):
    """What is trained"""

    lora_rank: Count = 0
    """Train a LoRA adapter of this rank beside the frozen weights (docs/lora.md). 0: all weights; or, where the folder
    given is an adapter's, that adapter."""
    lora_alpha: Above0 | None = None
    """Scale of the adapter: it is multiplied by this over the rank. Default: twice the rank."""
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(split_list), Field(min_length=1)] = ("all-linear",)
    """Linear layers that get an adapter, comma-separated, by the ends of their names (q_proj,v_proj). all-linear: all
    but the head."""
    lora_merge: bool = False
    """Write best/ and last/ as whole models, with the adapter merged, in place of adapters."""
    gradient_checkpointing: bool = False
    """Keep the inputs of the layers alone, and compute the rest again in the backward pass: less memory, more time."""
    fsdp: bool = False
    """With torchrun: share weights, gradient and optimizer out among the processes (FSDP2), for a student that does not
    fit on one GPU (docs/machines.md)."""

    @model_validator(mode="after")
    def _adapter_is_new(self) -> StudentOptions:
        for name in ("lora_alpha", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of a new adapter: give --lora-rank too")
        return self


class StepOptions(StudentOptions):
    """Optimizer"""

    lr: Above0 = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup: NotNegative = 0
    """Optimizer steps of linear warm-up; below 1, as a share of all steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Above0 = 1.0
    """The gradient is clipped to this norm."""
    micro_batch_tokens: Positive = 16384
    """Largest micro-batch, in tokens. It changes memory, not results."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the body's products, by autocast. Weights, gradients, head, loss and optimizer stay in float32."""
    checkpoint_every: Count = 100
    """Optimizer steps between checkpoints. 0: none before the end."""
    save_limit: Count = 2
    """Number of newest checkpoints to keep, also after the end, so that the run can be lengthened. 0: none after it."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(split_list)] = ()
    """Experiment trackers that get every number of metrics.jsonl and dev.jsonl too, comma-separated: tensorboard (in
    OUT/tensorboard) and wandb (signed in to, or with WANDB_MODE=offline)."""


class LossOptions(ReturnOptions, StepOptions):
    """Method"""

    method: Method = "ketchup"
    """ketchup (K-step returns), llmr (K = 1), reverse-kl and minillm (reverse KL of whole completions) learn from
    rollouts of the student; seqkd and kl from teacher outputs; js and tvd from half of each."""
    k: Positive = 4
    """Steps per jump of the return. 1 is LLMR. The paper's best are 2 to 8."""
    weights: Literal["comb", "flat", "gae", "mean"] = "comb"
    """Weights of the costs of later tokens. comb: 1 for every K-th (the paper's). flat: --lam for each. gae: --lam to
    the power of the distance, GAE with the teacher's max-Q as critic. mean: one over the number of later tokens."""
    lam: float = Field(default=0.25, ge=0, le=1)
    """λ of --weights flat and gae. 1 is LLMR; 0: no future."""
    end_weight: float | None = Field(default=None, ge=0, le=1)
    """Weight of the last token's cost (EOS), if it is to have one of its own."""
    cost: Literal["gap", "centred", "kl"] = "gap"
    """Cost of a later token. gap: max-Q minus Q (the paper's). centred: minus the batch's mean, so that going on is
    free on average. kl: log π − log p, which makes reverse KL of whole completions the aim."""
    exact: bool = False
    """Take the first step in expectation over the --keep-top largest teacher logits, in place of the token drawn."""
    keep_top: Positive = 64
    """Number of top teacher logits used per token, for `--method kl, reverse-kl, js, tvd, minillm` and for --exact.
    The scores must hold them. All other tokens count as one; with --exact and minillm, as drawn."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy on teacher outputs, which are half of each batch then. 0: none."""
    baseline: Baseline = "none"
    """Subtracted from the returns. mean, min-variance: one per time step. batch-mean: one of all tokens. leave-one-out:
    the other samples of the prompt."""
    clip_return: Above0 = 100.0
    """Returns are clipped to plus or minus this, after normalization (paper, Tables 4 and 5)."""
    reward: Annotated[str, AfterValidator(own_function)] = ""
    """Task reward R of a completion, added to the return of each of its tokens, behind weights and clip and before the
    baseline: a function of your own as package.module:function, or column:NAME of --reward-data."""
    reward_weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of --reward."""
    max_ratio: Above0 = 2.0
    """Largest importance ratio policy/behaviour policy of a token."""
    importance: bool = True
    """Weigh stale rollouts by the importance ratio. Off: all rollouts count as on-policy."""

    @property
    def top_needed(self) -> int:
        """How many of the teacher's largest logits the scores must hold."""
        return self.keep_top if METHODS[self.method].top_logits or self.exact else 0

    @property
    def needs_outputs(self) -> bool:
        """Whether it learns from teacher outputs, too or alone."""
        return METHODS[self.method].outputs or self.anchor > 0

    @property
    def method_text(self) -> str:
        """For messages."""
        return f"--method {self.method}" + (f" --anchor {self.anchor:g}" if self.anchor else "")

    @property
    def of_estimate(self) -> dict[str, Any]:
        """What `method.returns.k_step_returns` takes besides `of_returns`."""
        return {"k": self.k, "weights": self.weights, "lam": self.lam, "end_weight": self.end_weight}

    @model_validator(mode="after")
    def _weights_have_their_options(self) -> LossOptions:
        unused = {"lam": ("comb", "mean"), "k": ("flat", "gae", "mean"), "tail": ("flat", "gae", "mean")}
        for name in unused.keys() & self.model_fields_set:
            if self.weights in unused[name] and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"weights {self.weights} has no --{name}: leave it out, or choose other --weights")
        if self.end_weight is not None and self.weights == "comb" and self.tail == "one-step":
            raise ValueError("tail one-step counts the end whole: with --end-weight, set --tail jump")
        return self
