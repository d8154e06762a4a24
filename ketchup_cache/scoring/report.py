"""What `score` says that it did."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ketchup_cache.console import Report


@dataclass(frozen=True)
class ScoreReport(Report):
    """What one run did. Rows are rollouts, tokens are completion tokens."""

    teacher: str
    """Name and start of the fingerprint."""
    already: int
    """Rows that had scores before."""
    computed: int = 0
    """Rows that went through the teacher."""
    tokens: int = 0
    """Their tokens."""
    copied: int = 0
    """Rows whose scores were there for the same prompt and completion, from earlier or in this run."""
    segments: int = 0
    """Segments written."""
    batch_tokens: int | None = None
    """Largest batch, in tokens, that was used in the end; None where the teacher had nothing to compute."""
    seconds: float = 0.0
    """From start to end, loading included."""
    load_s: float = 0.0
    """Of them, reading the teacher's weights."""

    def plus(self, other: ScoreReport) -> ScoreReport:
        """This and what was done after it."""
        names = ("already", "computed", "tokens", "copied", "segments")
        counts = {name: getattr(self, name) + getattr(other, name) for name in names}
        return replace(self, **counts, batch_tokens=other.batch_tokens or self.batch_tokens)

    @property
    def hit_rate(self) -> float:
        """Share of this run's rows that did not need the teacher, in [0, 1]."""
        return self.copied / max(self.copied + self.computed, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if not self.computed + self.copied:
            return f"nothing to do: all {self.already:,} rollouts are scored by teacher {self.teacher}"
        batches = f", in batches of up to {self.batch_tokens:,} tokens" if self.batch_tokens else ""
        return (
            f"scored {self.computed:,} rollouts ({self.tokens:,} tokens, {self.tokens_per_second:,.0f}/s) by teacher "
            f"{self.teacher}, copied {self.copied:,} (hit rate {self.hit_rate:.0%}), {self.already:,} were there; "
            f"{self.segments} segments in {self.seconds:.1f} s{batches}"
        )
