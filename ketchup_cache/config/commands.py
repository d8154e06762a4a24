"""Every option of every command, once: flags, YAML keys, JSON Schema and help all come from here, config_base,
config_caches, config_groups and config_watch.

The text under a field is its help. The classes share groups of options through inheritance, so that an option
that several commands have means the same and has the same default in all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ketchup_cache.config.base import CacheAddress, Config, Positive
from ketchup_cache.config.caches import (
    ExportConfig,
    InfoConfig,
    MergeConfig,
    PullConfig,
    PushConfig,
    VerifyConfig,
)
from ketchup_cache.config.options import (
    DataOptions,
    DeviceOptions,
    Normalization,
    ReturnOptions,
    SamplingOptions,
    ScoringOptions,
    StepOptions,
    Tail,
    Unfinished,
)
from ketchup_cache.config.watch import ScorerOptions, WatchOptions

Baseline = Literal["none", "mean", "min-variance", "leave-one-out"]
Method = Literal["ketchup", "llmr", "seqkd", "kl", "reverse-kl", "js", "tvd"]
Metric = Literal["rouge", "bleu", "chrf", "ter", "exact", "gsm8k"]
Aspect = Literal["quality", "informativeness", "coherence"]


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


IntList = Annotated[tuple[int, ...], BeforeValidator(_split), Field(json_schema_extra={"metavar": "INT,INT,…"})]
MetricList = Annotated[tuple[Metric, ...], BeforeValidator(_split)]
AspectList = Annotated[tuple[Aspect, ...], BeforeValidator(_split), Field(min_length=1)]


class PretrainConfig(DeviceOptions, DataOptions, StepOptions):
    """Options of `ketchup-cache pretrain`."""

    data: str = ""
    """References to learn (teacher fine-tuning): a file or dataset with prompt and target. Not with --cache."""
    cache: CacheAddress | None = None
    """Completions to learn (pre-distillation, SeqKD): the finished rollouts in this cache."""
    policy: str | None = None
    """With --cache: only rollouts of this policy (name, or start of its fingerprint)."""
    model: str
    """Model to train: a folder or a Hub id."""
    out: Path
    """Folder for the trained model."""
    epochs: Positive = 5
    """Passes over the data."""
    lr: float = Field(default=3e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    batch_size: Positive = 8
    """Examples per optimizer step."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate after the warm-up."""
    max_new_tokens: Positive = 64
    """Longest target; longer ones are cut."""
    dropout: bool = True
    """Keep the model's own dropout on."""
    checkpoint_every: int = Field(default=500, ge=0)
    """Optimizer steps between checkpoints. 0: none."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of examples and of dropout."""

    @model_validator(mode="after")
    def _one_source(self) -> PretrainConfig:
        if bool(self.data) == (self.cache is not None):
            raise ValueError("give either --data (references) or --cache (rollouts of a teacher), not both")
        return self


class RolloutConfig(DeviceOptions, DataOptions, SamplingOptions):
    """Options of `ketchup-cache rollout`."""

    student: str
    """Policy that samples: a folder or a Hub id. A teacher is a policy too."""
    cache: CacheAddress
    """Cache that receives the rollouts; made if it is not there."""
    first: int = Field(default=0, ge=0)
    """Sample for the first so many prompts only; all are stored, for learn to go on with. 0: sample for all."""


class ScoreConfig(WatchOptions, DeviceOptions, ScoringOptions):
    """Options of `ketchup-cache score`."""

    teacher: str
    """Frozen model whose logits are the Q-values: a folder or a Hub id."""
    commit_tokens: Positive = 262144
    """Completion tokens per committed segment: the most that a killed run has to do again."""
    keep_top: int = Field(default=0, ge=0)
    """Also store the teacher's so many largest logits per token, for `learn --method kl, reverse-kl, js,
    tvd`. 0: none."""


class LearnConfig(ScorerOptions, DeviceOptions, ReturnOptions, SamplingOptions, ScoringOptions, StepOptions):
    """Options of `ketchup-cache learn`."""

    method: Method = "ketchup"
    """ketchup (K-step), llmr (K = 1), reverse-kl (on the student's samples), seqkd or kl (on teacher outputs), js or
    tvd (half on the ones, half on the others)."""
    student: str
    """Policy to train: a folder or a Hub id, best pre-distilled."""
    cache: CacheAddress
    """Cache with scored rollouts; refreshed rollouts go there too."""
    out: Path = Path("run")
    """Folder for the run: metrics.jsonl, config.json, checkpoint, and the trained student in student/."""
    scored_by: str | None = None
    """Which teacher's scores to use where the cache holds several (name, or start of its fingerprint)."""
    policy: str | None = None
    """Train only on rollouts of this policy (name, or start of its fingerprint)."""
    pin: Path | None = None
    """Use exactly the segments of another run: the pins.json in its folder. Anything else is refused."""
    teacher_outputs: str | None = None
    """seqkd, kl, js, tvd: policy whose rollouts are teacher outputs (name, or start of its fingerprint), if not the
    teacher itself."""
    keep_top: Positive = 64
    """kl, reverse-kl, js, tvd: compute with so many of the teacher's largest logits, which scores must hold; the rest
    is lumped."""
    refresh_every: Positive = 16
    """With a teacher or scorer: optimizer steps between new rollouts of the current student."""
    reuse: Positive = 1
    """With a teacher or scorer: steps that each new rollout is used in, in batches that are put together anew. It makes
    sampling and scoring so much cheaper; must divide --refresh-every. (PPO's epochs.)"""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps. 0: as many as --epochs gives."""
    epochs: Positive = 1
    """Passes over the scored rollouts (offline) or the prompts (with a teacher)."""
    batch_size: Positive = 256
    """Rollouts per optimizer step (the paper's 8 x 32)."""
    lr: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or linear to zero at the last step."""
    baseline: Baseline = "none"
    """Subtracted from the returns: mean or min-variance (per time step), or leave-one-out (samples of a prompt)."""
    clip_return: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    """Returns are clipped to plus or minus this, after normalisation (paper, Tables 4 and 5)."""
    max_ratio: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Truncation of the per-token importance ratio policy/behaviour."""
    importance: bool = True
    """Correct stale rollouts by the importance ratio. Off: treat every rollout as on-policy."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Optimizer steps between checkpoints. 0: only at the end."""

    @model_validator(mode="before")
    @classmethod
    def _llmr_is_k_1(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("method") == "llmr":
            if options.get("k") not in (None, 1, "1"):
                raise ValueError(f"method llmr is K = 1: leave --k out (it is {options['k']}), or use --method ketchup")
            return {**options, "k": 1}
        return options

    @model_validator(mode="after")
    def _method_fits(self) -> LearnConfig:
        if self.method in ("seqkd", "kl"):
            if self.refresher:
                raise ValueError(
                    f"method {self.method} learns from teacher outputs in the cache: leave {self.refresher} out"
                )
            if self.policy is not None:
                raise ValueError(
                    f"method {self.method} has no rollouts of a student: use --teacher-outputs, not --policy"
                )
        if self.method in ("js", "tvd") and self.batch_size // 2 % self.samples + self.batch_size % 2:
            raise ValueError(
                f"method {self.method} takes half of the {self.batch_size} rollouts from the teacher: "
                f"make half of --batch-size a multiple of --samples {self.samples}"
            )
        if self.method not in ("ketchup", "llmr") and self.baseline != "none":
            raise ValueError(f"method {self.method} has no returns, so no baseline: leave --baseline out")
        return self

    @property
    def top_needed(self) -> int:
        """How many of the teacher's largest logits scores must hold for this run."""
        return self.keep_top if self.method in ("kl", "reverse-kl", "js", "tvd") else 0

    @model_validator(mode="after")
    def _batches_fit(self) -> LearnConfig:
        if self.reuse > 1 and not self.refresher:
            raise ValueError("reuse is of new rollouts (--teacher or --scorer); from a cache alone, use --epochs")
        if self.refresh_every % self.reuse:
            raise ValueError(f"refresh_every {self.refresh_every} must be a multiple of reuse {self.reuse}")
        if self.baseline == "leave-one-out" and self.refresher and self.samples < 2:
            raise ValueError("baseline leave-one-out compares samples of one prompt: set --samples to 2 or more")
        if self.batch_size % self.samples:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of samples {self.samples}")
        return self


class EvaluateConfig(DeviceOptions, DataOptions, ScoringOptions):
    """Options of `ketchup-cache evaluate`."""

    model: str
    """Model to evaluate: a folder or a Hub id."""
    split: str = "test"
    """Split of a Hugging Face dataset."""
    metrics: MetricList = ("rouge", "bleu", "chrf", "ter", "exact")
    """Task metrics, comma-separated: rouge, bleu, chrf, ter, exact, gsm8k."""
    teacher: str | None = None
    """Also report the mean return of the outputs under this teacher."""
    normalization: Normalization = "logprob"
    """Of the return that is reported."""
    max_new_tokens: Positive = 64
    """Longest output."""
    rollout_batch: Positive = 64
    """Outputs generated at once."""
    calculator: bool = False
    """Compute what stands between << and = (GSM8K's annotations) and write the result for the model."""
    outputs: Path | None = None
    """Also write every prompt, output and target to this JSONL file."""


class JudgeConfig(Config):
    """Options of `ketchup-cache judge`."""

    system: Path
    """Outputs of the system in question, as `evaluate --outputs` writes them."""
    baseline: Path
    """Outputs of the system it is compared with, for the same prompts."""
    judge_model: str
    """Model that judges, by the name that the endpoint has for it."""
    base_url: str | None = None
    """OpenAI-compatible endpoint. Without it: OPENAI_BASE_URL, else OpenAI. The key is read from OPENAI_API_KEY."""
    kind: Literal["summary", "translation"] = "summary"
    """What the outputs are; the question is worded for it."""
    aspects: AspectList = ("quality", "informativeness", "coherence")
    """Questions, comma-separated: quality, informativeness, coherence."""
    answers: Path = Path("judge-answers.jsonl")
    """File of all answers; what stands there is not asked again."""
    limit: int = Field(default=0, ge=0)
    """Judge only so many pairs, drawn at random. 0: all."""
    seed: int = Field(default=0, ge=0)
    """Seed of that choice."""
    concurrency: Positive = 8
    """Queries under way at once."""
    judge_temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Sampling temperature of the judge."""
    judge_tokens: Positive = 256
    """Longest answer of the judge."""
    retries: int = Field(default=5, ge=0)
    """Tries after one that failed (busy, broken or no connection), with growing pauses."""
    timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds to wait for an answer."""


class AnalyzeConfig(Config):
    """Options of `ketchup-cache analyze`."""

    cache: CacheAddress
    """Cache with scored rollouts, several per prompt."""
    ks: IntList = (1, 2, 4, 8, 16)
    """Values of K."""
    scored_by: str | None = None
    """Which teacher's scores to use where the cache holds several (name, or start of its fingerprint)."""
    policy: str | None = None
    """Only rollouts of this policy (name, or start of its fingerprint). Without it, each policy on its own."""
    tail: Tail = "one-step"
    """The last K steps: one-step (Algorithm 1) or jump (Eq. 7)."""
    normalization: Normalization = "logprob"
    """Subtracted from all logits of a state."""
    unfinished: Unfinished = "bootstrap"
    """Rollouts cut at the length limit: bootstrap, zero or drop."""
    out: Path | None = None
    """Folder for analysis.json and analysis.png."""


class RecipesConfig(Config):
    """Options of `ketchup-cache recipes`."""

    name: str | None = None
    """Recipe to print with its commands. Without it, all are listed."""


class DemoConfig(Config):
    """Options of `ketchup-cache demo`."""

    out: Path = Path("demo-run")
    """Folder for everything the demo makes. Interrupted, it goes on from there."""


COMMANDS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "rollout": RolloutConfig,
    "score": ScoreConfig,
    "learn": LearnConfig,
    "evaluate": EvaluateConfig,
    "judge": JudgeConfig,
    "analyze": AnalyzeConfig,
    "info": InfoConfig,
    "verify": VerifyConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "demo": DemoConfig,
    "recipes": RecipesConfig,
}
