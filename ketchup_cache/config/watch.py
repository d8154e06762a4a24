"""Options of the lab teacher: `score --watch` and `learn --scorer`."""

from __future__ import annotations

from pydantic import Field, model_validator

from ketchup_cache.config.base import CacheAddress, Config


class WatchOptions(Config):
    cache: CacheAddress | None = None
    """Cache whose rollouts are scored once. Either this or --watch."""
    watch: CacheAddress | None = None
    """Shared cache (a path, s3://, gs://, az://) to watch: keep the teacher loaded and score what appears."""
    poll: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """With --watch: seconds between two looks for new rollouts."""
    idle_exit: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """With --watch: stop once everything has been scored for so many seconds. 0: never."""

    @model_validator(mode="after")
    def _once_or_watching(self) -> WatchOptions:
        if (self.cache is None) == (self.watch is None):
            raise ValueError("give either --cache (score it once) or --watch (score whatever appears there)")
        return self


class ScorerOptions(Config):
    teacher: str | None = None
    """Scores refreshed rollouts in this process: a folder or a Hub id. Not with --scorer; without both, learning is
    offline, from the cache alone."""
    scorer: str | None = None
    """Instead of --teacher: `ketchup-cache score --watch` elsewhere scores refreshed rollouts. watch: in --cache; an
    address: rollouts go there and their scores come to --cache. --scored-by says which teacher if there are several."""
    scorer_timeout: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """With --scorer: give up after so many seconds in which nobody is scoring. 0: wait for ever."""

    @model_validator(mode="after")
    def _one_teacher(self) -> ScorerOptions:
        if self.teacher is not None and self.scorer is not None:
            raise ValueError(
                "with --scorer the teacher is in another process: leave --teacher out, and say which with --scored-by"
            )
        return self

    @property
    def refresher(self) -> str | None:
        """The option by which rollouts are refreshed; None where learning is offline."""
        return "--teacher" if self.teacher is not None else "--scorer" if self.scorer is not None else None
