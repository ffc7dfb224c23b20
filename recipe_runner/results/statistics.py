"""Means over rows, and their bootstrap confidence intervals (Efron 1979, percentile intervals)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
BOUNDS = (2.5, 97.5)  # percentiles: 95 % of the resamples are between


@dataclass(frozen=True)
class Measure:
    """A ratio of two sums over rows: a mean, where every part is 1.

    Attributes:
        sums: Array `(rows,)` of what is summed.
        parts: Array `(rows,)` of what the sum is divided by: tokens of the row, or 1.
        exponential: Whether e to the ratio is meant (perplexity).
        minus: What is taken off it: a difference of two means over other rows.
    """

    sums: np.ndarray
    parts: np.ndarray
    exponential: bool = False
    minus: "Measure | None" = None

    def of(self, rows: np.ndarray) -> "Measure":
        """The same of some rows."""
        minus = self.minus.of(rows) if self.minus else None
        return Measure(self.sums[rows], self.parts[rows], self.exponential, minus)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; nan where no row has a part in it."""

    value: float
    low: float
    high: float


Resampled = Mapping[str, tuple[float, np.ndarray]]  # name -> value, and an array `(resamples,)`


def resample(measures: Mapping[str, Measure], seed: int) -> Resampled:
    """Values of measures of the same rows, and of resamples of them: the same ones for all, so they can be paired."""
    if not measures:
        return {}
    nothing = np.zeros(len(next(iter(measures.values())).sums))
    table = np.concatenate(
        [
            [of.sums, of.parts, *((of.minus.sums, of.minus.parts) if of.minus else (nothing, nothing + 1))]
            for of in measures.values()
        ]
    ).astype(float)
    rows, generator = table.shape[1], np.random.default_rng(seed)
    totals = np.empty((RESAMPLES + 1, len(table)))
    totals[0] = table.sum(axis=1)
    for number in range(1, RESAMPLES + 1):
        totals[number] = table @ np.bincount(generator.integers(0, rows, rows), minlength=rows)
    found = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for place, (name, measure) in enumerate(measures.items()):
            sums, parts, less, of = (totals[:, 4 * place + number] for number in range(4))
            ratio = np.exp(sums / parts) if measure.exponential else sums / parts - less / of
            found[name] = float(ratio[0]), ratio[1:]
    return found


def estimate(value: float, values: np.ndarray) -> Estimate:
    """A value with the interval of its resamples; those without a value (0 tokens drawn) are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.percentile(finite, BOUNDS)
    return Estimate(value, float(low), float(high))
