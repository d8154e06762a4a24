"""Where options stand in help, and what people call them elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

MOST_USED: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("data", "cache", "eval_data", "metric", "epochs", "batch_size", "lr", "lora_rank"),
    "rollout": ("samples", "greedy", "max_new_tokens", "first", "seed", "student_url", "student_name"),
    "score": ("teacher", "teacher_url", "teacher_name", "keep_top", "follow", "dtype"),
    "learn": (
        "out", "teacher", "method", "k", "exact", "baseline", "lr", "steps", "batch_size", "refresh_every",
        "eval_data", "metric", "lora_rank",
    ),
    "evaluate": ("metrics", "teacher", "outputs", "max_new_tokens"),
    "analyze": ("ks", "gradient", "student", "out"),
    "show": ("rows", "color", "tokenizer", "k"),
}  # fmt: skip
"""Of each command: what most runs set, in the order of its help."""

ADVANCED = {
    "commit_tokens", "device_map", "end_weight", "idle_timeout", "importance", "in_flight", "lora_merge",
    "lora_targets", "max_disagreement", "max_grad_norm", "max_mismatch", "max_ratio", "micro_batch_tokens",
    "normalization", "pin", "poll", "retry_for", "rollout_batch", "save_limit", "scores_timeout", "tail",
    "teacher_outputs", "trust_remote_code", "unfinished", "until_idle", "weight_decay",
}  # fmt: skip
"""Options whose defaults are right nearly always."""

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    # commands
    "train": ("learn", "pretrain"), "distill": ("learn",), "sft": ("pretrain", "seqkd"), "finetune": ("pretrain",),
    "sample": ("rollout",), "generate": ("rollout",), "eval": ("evaluate",), "label": ("score",),
    "stats": ("info",),
    # options of TRL and transformers
    "adapter_rank": ("lora_rank",), "dataset": ("data",), "dataset_name": ("data",), "do_sample": ("greedy",),
    "eval_dataset": ("eval_data",), "eval_steps": ("eval_every",),
    "gradient_accumulation_steps": ("micro_batch_tokens",),
    "learning_rate": ("lr",), "loss_type": ("method",), "lora_r": ("lora_rank",), "lr_scheduler_type": ("schedule",),
    "max_completion_length": ("max_new_tokens",), "max_length": ("max_new_tokens", "max_prompt_tokens"),
    "max_prompt_length": ("max_prompt_tokens",), "max_steps": ("steps",), "max_tokens": ("max_new_tokens",),
    "model_name_or_path": ("student", "model"), "n": ("samples",), "num_generations": ("samples",),
    "num_return_sequences": ("samples",), "num_train_epochs": ("epochs",), "output": ("out", "outputs"),
    "output_dir": ("out",), "per_device_train_batch_size": ("batch_size",), "policy_model": ("student",),
    "report_to": ("track",), "save_steps": ("checkpoint_every",), "save_total_limit": ("save_limit",),
    "student_model": ("student",), "teacher_model": ("teacher",), "teacher_model_name_or_path": ("teacher",),
    "top_logits": ("keep_top",), "torch_dtype": ("dtype", "precision"), "train_file": ("data",),
    "validation_file": ("eval_data",), "warmup_ratio": ("warmup",), "warmup_steps": ("warmup",),
    # methods
    "fkl": ("kl",), "forward-kl": ("kl",), "gkd": ("reverse-kl", "js"), "jsd": ("js",), "kd": ("kl",),
    "on-policy-distillation": ("reverse-kl",), "opd": ("reverse-kl",), "reinforce": ("llmr",), "rkl": ("reverse-kl",),
    "total-variation": ("tvd",),
}  # fmt: skip
"""Names of other tools → ours."""


def did_you_mean(given: str, known: Iterable[str], show: Callable[[str], str] = "`{}`".format) -> str:
    """`: did you mean A or B?`, or nothing where none of `known` is near. show: writes one of them."""
    known, key = set(known), given.strip("-").lower()
    names = [name for name in ELSEWHERE.get(key.replace("-", "_"), ELSEWHERE.get(key, ())) if name in known]
    names = (
        names
        or difflib.get_close_matches(key.replace("-", "_"), known, n=1)
        or difflib.get_close_matches(key, known, n=1)
    )
    return f": did you mean {' or '.join(map(show, names))}?" if names else ""
