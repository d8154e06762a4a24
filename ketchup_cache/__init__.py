"""ketchup-cache: distil language models by reinforcement learning, from a teacher's scores computed once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ketchup_cache.version import __version__

if TYPE_CHECKING:
    from ketchup_cache.config.commands import EvaluateConfig, LearnConfig, PretrainConfig, RolloutConfig, ScoreConfig
    from ketchup_cache.console import on_progress
    from ketchup_cache.evaluation.evaluate import evaluate
    from ketchup_cache.method.baselines import (
        batch_mean_baseline,
        leave_one_out_baseline,
        mean_baseline,
        min_variance_baseline,
    )
    from ketchup_cache.method.losses import importance_ratio, policy_gradient_loss
    from ketchup_cache.method.returns import k_step_returns
    from ketchup_cache.report.export import to_dataset
    from ketchup_cache.rollouts.elsewhere import add_rollouts
    from ketchup_cache.rollouts.rollout import rollout
    from ketchup_cache.scoring.elsewhere import score_with
    from ketchup_cache.scoring.score import score
    from ketchup_cache.sharing.remote_cache import open_cache
    from ketchup_cache.training.datasets import Collator, ScoredRows
    from ketchup_cache.training.learn import learn
    from ketchup_cache.training.pretrain import pretrain
    from ketchup_cache.training.run import Callback

_HOME = {
    "open_cache": "sharing.remote_cache",
    "to_dataset": "report.export",
    "add_rollouts": "rollouts.elsewhere",
    "score_with": "scoring.elsewhere",
    "ScoredRows": "training.datasets",
    "Collator": "training.datasets",
    "k_step_returns": "method.returns",
    **{f"{name}_baseline": "method.baselines" for name in ("mean", "batch_mean", "min_variance", "leave_one_out")},
    "policy_gradient_loss": "method.losses",
    "importance_ratio": "method.losses",
    "rollout": "rollouts.rollout",
    "score": "scoring.score",
    "pretrain": "training.pretrain",
    "learn": "training.learn",
    "Callback": "training.run",
    "on_progress": "console",
    "evaluate": "evaluation.evaluate",
    **{f"{name}Config": "config.commands" for name in ("Rollout", "Score", "Pretrain", "Learn", "Evaluate")},
}
__all__ = [
    "Callback",
    "Collator",
    "EvaluateConfig",
    "LearnConfig",
    "PretrainConfig",
    "RolloutConfig",
    "ScoreConfig",
    "ScoredRows",
    "__version__",
    "add_rollouts",
    "batch_mean_baseline",
    "evaluate",
    "importance_ratio",
    "k_step_returns",
    "learn",
    "leave_one_out_baseline",
    "mean_baseline",
    "min_variance_baseline",
    "on_progress",
    "open_cache",
    "policy_gradient_loss",
    "pretrain",
    "rollout",
    "score",
    "score_with",
    "to_dataset",
]


for _talkative in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    # transformers imports them where they are installed, and they speak of kernels for other machines
    logging.getLogger(_talkative).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: importing the package loads neither torch nor Zarr."""
    if name not in _HOME:
        raise AttributeError(f"module 'ketchup_cache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ketchup_cache.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
