"""Every command's options, one class per command: flags, YAML keys, JSON Schema and help all come from here.

Options that several commands share are in config/options.py, so that each means the same in all of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ketchup_cache.config import options as shared
from ketchup_cache.config.goal import GoalOptions
from ketchup_cache.config.methods import METHODS
from ketchup_cache.config.servers import EngineOptions, ScoringOptions
from ketchup_cache.config.values import (
    Above0,
    CacheAddress,
    Config,
    Count,
    MetricList,
    Normalization,
    NotNegative,
    Positive,
    split_list,
)

OF_NEW_ROLLOUTS = {"refresh_every", "refresh_below_ess", "reuse", "student_url", "student_name"}
"""Options of `learn` that mean nothing without --teacher or --scores-from. A file may hold them all the same."""
IntList = Annotated[tuple[int, ...], BeforeValidator(split_list), Field(json_schema_extra={"metavar": "INT,INT,…"})]


class PretrainConfig(shared.DevOptions, shared.DataOptions, shared.StepOptions, shared.DeviceOptions):
    """Options of `ketchup-cache pretrain`."""

    model: str
    """Model to train: a folder or a Hub id."""
    out: Path
    """Folder of the run. The trained model is in best/ and last/: the best on the dev set, and that of the last
    step."""
    data: str = ""
    """References to learn (teacher fine-tuning): a file or dataset with prompt and target. Not with --cache."""
    cache: CacheAddress | None = None
    """Cache whose finished rollouts are learned (pre-distillation, SeqKD). Not with --data."""
    policy: str | None = None
    """With --cache: policy whose rollouts are learned, by name or start of its fingerprint."""
    turns: Literal["all", "last"] = "all"
    """With --data, of a conversation: which turns of the assistant are learned."""
    epochs: Positive = 5
    """Passes over the data."""
    batch_size: Positive = 8
    """Examples per optimizer step."""
    lr: Above0 = 3e-5
    """Peak learning rate of AdamW."""
    max_new_tokens: Positive = 64
    """Longest target, in tokens with EOS. Of --data: see --long-targets. It also limits the outputs on the dev set."""
    long_targets: Literal["refuse", "truncate", "drop"] = "truncate"
    """With --data: what happens to a longer target. refuse: an error. truncate: it loses its end and EOS, and how many
    do is said. drop: the example is left out."""
    dropout: bool = True
    """Use the model's own dropout."""
    checkpoint_every: Count = 500
    """Optimizer steps between checkpoints. 0: none before the end."""
    seed: Count = 0
    """Seed of the order of examples and of dropout."""

    @model_validator(mode="after")
    def _one_source(self) -> PretrainConfig:
        if bool(self.data) == (self.cache is not None):
            raise ValueError("give either --data (references) or --cache (rollouts of a teacher), not both")
        return self


class RolloutConfig(EngineOptions, shared.DataOptions, shared.RayOptions):
    """Options of `ketchup-cache rollout`."""

    student: str
    """Policy that samples: a folder or a Hub id. It may be a teacher."""
    cache: CacheAddress
    """Cache that receives the rollouts. It is made if it does not exist."""
    first: Count = 0
    """Number of prompts to sample for. The others are stored too, for `learn` to sample later. 0: all."""


class ScoreConfig(ScoringOptions, shared.RayOptions):
    """Options of `ketchup-cache score`."""

    teacher: str = ""
    """Frozen model whose logits are the Q-values: a folder or a Hub id. With --teacher-url: where its tokenizer is, if
    not where the cache says."""
    cache: CacheAddress
    """Cache whose rollouts are scored."""
    keep_top: Count = 0
    """Number of top teacher logits stored per token, for `learn --method kl, reverse-kl, js, tvd, minillm` and
    `learn --exact`. 0: none."""
    storage: Literal["float32", "float16"] = "float32"
    """Precision of the stored scores. float16 takes about half the space."""
    commit_tokens: Positive = 262144
    """Completion tokens per committed segment: the most that a killed run repeats."""
    follow: bool = False
    """Keep the teacher loaded and score new rollouts as they appear, until Ctrl-C."""
    poll: Above0 = 2.0
    """With --follow: seconds between two looks for new rollouts."""
    until_idle: NotNegative = 0.0
    """With --follow: stop when there was nothing to score for this many seconds. 0: never."""
    estimate: bool = False
    """Only say how long it would take and what it would store, by a few rows that the teacher reads. Not --follow."""

    @model_validator(mode="after")
    def _a_teacher(self) -> ScoreConfig:
        if self.estimate and self.follow:
            raise ValueError("--estimate is of what waits now, and --follow has no end: give one of them")
        if not self.teacher and not self.teacher_url:
            raise ValueError("--teacher is missing: frozen model whose logits are the Q-values; or give --teacher-url")
        if self.follow and self.engine == "ray":
            raise ValueError("follow keeps one teacher in its process: start it on each machine, without --engine ray")
        return self


class LearnConfig(GoalOptions, EngineOptions, ScoringOptions, shared.DevOptions, shared.StepOptions):
    """Options of `ketchup-cache learn`."""

    student: str
    """Policy to train: a folder or a Hub id. It should be pre-distilled."""
    cache: CacheAddress
    """Cache with scored rollouts. New rollouts of the student go there too."""
    out: Path = Path("run")
    """Folder of the run. The trained student is in best/ and last/: the best on the dev set, and that of the last
    step."""
    scores_from: str | None = None
    """Where `ketchup-cache score --follow` scores new rollouts, instead of --teacher: a path or an address; cache: in
    --cache itself."""
    scores_timeout: NotNegative = 0.0
    """With --scores-from: give up when no scores came for this many seconds. 0: never."""
    pin: Path | None = None
    """Use the segments of another run and no others: the pins.json in its folder."""
    teacher_outputs: str | None = None
    """Policy whose rollouts are the teacher outputs of seqkd, kl, js, tvd and --anchor: its name or the start of its
    fingerprint. Default: the teacher."""
    steps: Count = 0
    """Optimizer steps. 0: as many as --epochs gives."""
    epochs: Positive = 1
    """Passes over the scored rollouts (offline) or over the prompts (with new rollouts)."""
    batch_size: Positive = 256
    """Rollouts per optimizer step (the paper's 8 x 32)."""
    refresh_every: Positive = 16
    """With --teacher or --scores-from: optimizer steps between new rollouts of the student."""
    refresh_below_ess: float = Field(default=0.0, ge=0, lt=1)
    """With --teacher or --scores-from: sample new rollouts earlier, after a step whose effective sample size is below
    this share. --refresh-every stays the upper limit. 0: never."""
    reuse: Positive = 1
    """With --teacher or --scores-from: optimizer steps that use each new rollout, in other batches each time (the
    epochs of PPO). A divisor of --refresh-every."""

    @property
    def offline(self) -> bool:
        """Whether all rollouts come from the cache as it is."""
        return self.teacher is None and not self.teacher_url and self.scores_from is None

    @model_validator(mode="before")
    @classmethod
    def _only_what_the_method_has(cls, options: Any) -> Any:
        method = str(options.get("method")) if isinstance(options, dict) else ""
        for name, (value, why) in METHODS[method].fixed.items() if method in METHODS else ():
            given = options.get(name)
            if given not in (None, value, str(value)):
                flag = name.replace("_", "-")
                raise ValueError(f"method {method} {why}: leave --{flag} out (it is {given}), or use another --method")
            if value != cls.model_fields[name].default:
                options = {**options, name: value}
        return options

    @model_validator(mode="after")
    def _batches_fit(self) -> LearnConfig:
        rule = METHODS[self.method]
        if (self.teacher is not None or self.teacher_url) and self.scores_from is not None:
            raise ValueError("with --scores-from, leave --teacher out, and choose one with --scored-by")
        if rule.samples and self.needs_outputs and self.batch_size // 2 % self.samples + self.batch_size % 2:
            raise ValueError(
                f"{self.method_text} takes half of the {self.batch_size} rollouts from the teacher: "
                f"make half of --batch-size a multiple of --samples {self.samples}"
            )
        for name in sorted(OF_NEW_ROLLOUTS & self.model_fields_set) if self.offline else ():
            raise ValueError(f"{name} is of new rollouts (--teacher, --scores-from); from a cache alone, use --epochs")
        if self.refresh_below_ess and self.reuse > 1:
            raise ValueError("refresh_below_ess is of new rollouts, each used once: leave --reuse out")
        if self.refresh_every % self.reuse:
            raise ValueError(f"refresh_every {self.refresh_every} must be a multiple of reuse {self.reuse}")
        if self.baseline == "leave-one-out" and not self.offline and self.samples < 2:
            raise ValueError("baseline leave-one-out compares samples of one prompt: set --samples to 2 or more")
        if self.batch_size % self.samples:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of samples {self.samples}")
        return self


class EvaluateConfig(
    shared.DataOptions, shared.GreedyOptions, ScoringOptions, shared.RougeOptions, shared.ShardOptions
):
    """Options of `ketchup-cache evaluate`."""

    model: str
    """Model to evaluate: a folder or a Hub id."""
    split: str = "test"
    """Split of a Hugging Face dataset."""
    metrics: MetricList = ("rouge", "bleu", "chrf", "ter", "exact")
    """Task metrics, comma-separated: rouge (or rouge1, rouge2, rougeL), bleu, chrf, ter, exact, accuracy (final answers
    of GSM8K), loss (cross-entropy of the references), or a function of your own as package.module:function."""
    teacher: str | None = None
    """Teacher under which the mean return of the outputs is reported too."""
    normalization: Normalization = "logprob"
    """Normalization of that return: raw, centred or logprob."""
    outputs: Path | None = None
    """JSONL file that receives every prompt, output and target."""
    card: bool = False
    """Add the metrics to the model card: README.md in the folder of the model."""

    @model_validator(mode="after")
    def _card_is_of_the_whole(self) -> EvaluateConfig:
        if self.card and self.shard:
            raise ValueError("card holds metrics of whole data, and --shard makes those of a part: leave one out")
        return self


class CompareConfig(shared.RougeOptions):
    """Options of `ketchup-cache compare`."""

    a: Path
    """Outputs of one model: what `evaluate --outputs` wrote."""
    b: Path
    """Outputs of another model for the same data."""
    metrics: MetricList = ("bleu", "chrf", "ter", "rouge", "exact")
    """Task metrics, comma-separated, as those of `evaluate` that are of texts."""
    resamples: Positive = 1000
    """Bootstrap samples."""
    examples: Count = 3
    """Number of examples to show where B wins most, and where it loses most."""


class ShowConfig(shared.PromptOptions, shared.SelectOptions, shared.ReturnOptions):
    """Options of `ketchup-cache show`."""

    what: str
    """What to show: data (a file, or a Hub data set), a cache, the folder of a run, or outputs of `evaluate`."""
    rows: Annotated[str, Field(pattern=r"^(\d+|\d*:\d*)$")] = "0:5"
    """Rows to show, counted from 0: one (7), or from one up to another (20:30)."""
    tokenizer: str | None = None
    """Model whose tokenizer is used: a folder or a Hub id. Of a cache or a run, by default its own; of data, without
    one the texts are shown and not their tokens."""
    color: Literal["gap", "return"] = "gap"
    """What colours the tokens on a terminal: the gap max-Q minus Q, or the K-step return. The darker the worse."""
    k: Positive = 4
    """Steps per jump of the return. Of a run, by default its own estimator."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    max_new_tokens: Count = 0
    """With data and --tokenizer: longest reference, in tokens; a longer one is shown cut. 0: no limit."""

    @property
    def span(self) -> tuple[int, int]:
        """First row, and the one after the last."""
        start, colon, stop = self.rows.partition(":")
        first = int(start or 0)
        return first, int(stop or sys.maxsize) if colon else first + 1


class ReportConfig(shared.DeviceOptions):
    """Options of `ketchup-cache report`."""

    runs: Annotated[tuple[Path, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]
    """Folders of runs of `learn` or `pretrain`."""
    out: Path
    """HTML file to write. It loads nothing."""
    rollouts: Count = 24
    """Rollouts to show token by token, of all runs together."""
    student: Literal["best", "last"] | None = None
    """Model of each run that gives these rollouts its probabilities, and so importance ratios. Default: no model is
    loaded."""


class AnalyzeConfig(shared.SelectOptions, shared.ReturnOptions, shared.DeviceOptions):
    """Options of `ketchup-cache analyze`."""

    cache: CacheAddress
    """Cache with scored rollouts, several per prompt."""
    ks: IntList = (1, 2, 4, 8, 16)
    """Values of K."""
    out: Path | None = None
    """Folder that receives analysis.json, analysis.png and weights.png; with --gradient, gradient.json."""
    gradient: bool = False
    """Compare the gradients of --student that the estimators of `learn` give, in place of their returns: bias, noise,
    and where each pushes the length."""
    student: str = ""
    """With --gradient: the policy whose rollouts are in the cache, a folder or a Hub id."""
    batch_size: Positive = 256
    """With --gradient: rollouts per gradient."""


class InfoConfig(Config):
    """Options of `ketchup-cache info`."""

    cache: CacheAddress
    """Cache to describe: a path or an address."""
    other: CacheAddress | None = None
    """Another cache. Shows what only one of the two has."""


class VerifyConfig(Config):
    """Options of `ketchup-cache verify`."""

    cache: CacheAddress
    """Cache to check: every byte against its manifest."""
    deep: bool = False
    """Also decode every array and check every rule of the format."""
    clean: bool = False
    """Delete what crashes have left: data without a manifest, and unfinished files. Segments stay."""
    older_than: NotNegative = 24.0
    """With --clean: hours. Younger files stay, since a writer may need them."""
    dry_run: bool = False
    """With --clean: only say what would be deleted."""
    set_aside: bool = False
    """Move damaged segments, and all that were made from them, to the folder aside of the cache, so that the others can
    be used."""


class CopyOptions(Config):
    """Copying"""

    dry_run: bool = False
    """Only say what would be copied."""


class PushConfig(CopyOptions):
    """Options of `ketchup-cache push`."""

    cache: CacheAddress
    """Cache whose segments are copied: a path or an address. Or the folder of a trained model."""
    url: str
    """Target: a path, s3://bucket/name, gs://…, or hf://datasets/owner/name; of a model, hf://owner/name. It is made if
    it does not exist."""
    license: str | None = None
    """License id for the card of a Hub data set. Default: it stays as it is. That of a model is for its README.md."""

    @property
    def of_a_model(self) -> bool:
        return bool(re.match("hf://(?!datasets/)", self.url))

    @model_validator(mode="after")
    def _license_is_of_a_cache(self) -> PushConfig:
        if self.license and self.of_a_model:
            raise ValueError("license is of a cache; write that of a model into the README.md of its folder")
        return self


class PullConfig(CopyOptions):
    """Options of `ketchup-cache pull`."""

    url: str
    """Source: a path, s3://bucket/name, gs://…, https://…, or hf://datasets/owner/name."""
    cache: CacheAddress
    """Cache that receives the segments: a path or an address. It is made if it does not exist."""


class MergeConfig(CopyOptions):
    """Options of `ketchup-cache merge`."""

    a: str
    """A cache: a path or an address."""
    b: str
    """Another cache."""
    into: str
    """Cache that receives what it lacks of both. It may be one of the two; it is made if it does not exist."""


class ExportConfig(shared.SelectOptions):
    """Options of `ketchup-cache export`."""

    cache: CacheAddress
    """Cache to export: a path or an address."""
    out: Path
    """New folder for the files."""
    to: Literal["parquet", "hf-dataset"]
    """parquet: files. hf-dataset: a folder for `datasets.load_from_disk`."""
    keep_top: Count = 0
    """Number of top teacher logits per token to export. Only rollouts whose scores keep them. 0: none."""
    unscored: bool = False
    """Also export rollouts without scores. What would come from the teacher is null."""


class RecipesConfig(Config):
    """Options of `ketchup-cache recipes`."""

    name: str | None = None
    """Recipe to print with its commands. Default: a list of all."""


class EnvConfig(Config):
    """Options of `ketchup-cache env`."""


class DemoConfig(Config):
    """Options of `ketchup-cache demo`."""

    out: Path = Path("demo-run")
    """Folder for everything the demo makes. An interrupted demo goes on there."""


COMMANDS: dict[str, type[Config]] = {
    config.__name__.removesuffix("Config").lower(): config
    for config in (
        PretrainConfig, RolloutConfig, ScoreConfig, LearnConfig, EvaluateConfig, CompareConfig, AnalyzeConfig,
        ShowConfig, ReportConfig, InfoConfig,
        VerifyConfig, PushConfig, PullConfig, MergeConfig, ExportConfig, DemoConfig, RecipesConfig, EnvConfig,
    )
}  # fmt: skip
