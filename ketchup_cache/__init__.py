"""ketchup-cache: distil language models by reinforcement learning, from a teacher's scores computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ketchup_cache.version import __version__

if TYPE_CHECKING:
    from ketchup_cache.config.commands import EvaluateConfig, LearnConfig, PretrainConfig, RolloutConfig, ScoreConfig
    from ketchup_cache.evaluation.evaluate import evaluate
    from ketchup_cache.method.returns import k_step_returns
    from ketchup_cache.rollouts.rollout import rollout
    from ketchup_cache.scoring.score import score
    from ketchup_cache.sharing.remote_cache import open_cache
    from ketchup_cache.training.learn import learn
    from ketchup_cache.training.pretrain import pretrain
    from ketchup_cache.training.run import Callback

_HOME = {
    "open_cache": "sharing.remote_cache",
    "k_step_returns": "method.returns",
    "rollout": "rollouts.rollout",
    "score": "scoring.score",
    "pretrain": "training.pretrain",
    "learn": "training.learn",
    "Callback": "training.run",
    "evaluate": "evaluation.evaluate",
    **{f"{name}Config": "config.commands" for name in ("Rollout", "Score", "Pretrain", "Learn", "Evaluate")},
}
__all__ = [
    "Callback",
    "EvaluateConfig",
    "LearnConfig",
    "PretrainConfig",
    "RolloutConfig",
    "ScoreConfig",
    "__version__",
    "evaluate",
    "k_step_returns",
    "learn",
    "open_cache",
    "pretrain",
    "rollout",
    "score",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: importing the package loads neither torch nor Zarr."""
    if name not in _HOME:
        raise AttributeError(f"module 'ketchup_cache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ketchup_cache.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
