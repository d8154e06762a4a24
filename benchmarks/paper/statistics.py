"""Means, standard errors and paired tests over seeds. Runs of one seed share rollouts and order: they are pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Mean:
    """mean ± standard error of n values (n − 1 degrees of freedom); se None for a single one."""

    mean: float
    se: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n, mean = len(values), math.fsum(values) / len(values)
        if n < 2:
            return cls(mean, None, n)
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n), n)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.se:.2f}" if self.se is not None else "")


@dataclass(frozen=True)
class Comparison:
    """A row against the reference, over the seeds that both have. p: two-sided paired t-test; None where n < 2."""

    difference: Mean
    p: float | None

    @classmethod
    def of(cls, values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
        """values, reference: seed → value."""
        seeds = sorted(values.keys() & reference.keys())
        differences = [values[seed] - reference[seed] for seed in seeds]
        if len(seeds) < 2:
            return cls(Mean.of(differences), None)
        if len(set(differences)) == 1:  # no spread at all: the test is not defined
            return cls(Mean.of(differences), 1.0 if differences[0] == 0 else 0.0)
        return cls(Mean.of(differences), float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of even one false claim among them is at most the level."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
