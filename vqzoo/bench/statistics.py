"""Means over seeds, paired differences to a baseline, and what may be said of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from vqzoo.evaluation.config import better

FEWEST = 3
"""Values that an interval or a test needs."""

ALPHA = 0.05
"""The error that intervals, and a table's verdicts on one metric together, may have."""

BETTER, WORSE, WITHIN = "better", "worse", "within noise"

CONSTANT = "the same in every seed"
"""Said of a difference that does not vary, so that there is no noise to test it against."""

DIRECTED = ("psnr", "ssim", "ms_ssim", "lpips", "rfid", "gfid", "kid", "fd", "precision", "recall", "usage")
"""The first parts of the names of metrics of which more or less is better; of others, neither is."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its 95% interval, None of fewer than three values; `lost` were no finite numbers."""

    mean: float | None
    half: float | None
    count: int
    lost: int = 0


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences to the baseline, with the test's p-value before and after Holm's correction.

    `said` is the verdict, or why there is none.
    """

    estimate: Estimate
    p: float | None = None
    corrected: float | None = None
    said: str = ""

    @property
    def verdict(self) -> str | None:
        return self.said if self.said in (BETTER, WORSE, WITHIN) else None


def direction(name: str) -> int:
    """Return 1 if more of a metric is better, -1 if less is, 0 if neither."""
    if not any(name == first or name.startswith(f"{first}_") for first in DIRECTED):
        return 0
    return 1 if better(name, 1.0, 0.0) else -1


def by_seed(rows: Iterable[dict[str, Any]], name: str) -> dict[int, float]:
    """Return a metric's values in finished rows by their seeds; a number may be NaN or infinite."""
    return {row["seed"]: float(row["values"][name]) for row in rows
            if row["status"] == "finished" and row["values"].get(name) is not None}


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean of the finite values with Student's t interval."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    count, lost = len(finite), len(values) - len(finite)
    if not finite:
        return Estimate(None, None, 0, lost)
    mean = math.fsum(finite) / count
    if count < FEWEST:
        return Estimate(mean, None, count, lost)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (count - 1))
    return Estimate(mean, _quantile(count) * spread / math.sqrt(count), count, lost)


def _quantile(count: int) -> float:
    return float(stats.t.ppf(1 - ALPHA / 2, count - 1))


def difference(variant: dict[int, float], baseline: dict[int, float]) -> Difference:
    """Return a variant's differences to the baseline, paired by the seeds that both have, with the paired t-test's p-value.

    A difference that is the same in every seed, but for rounding, has no p-value; one that is 0 in every seed has p = 1.
    """
    both = [seed for seed in variant if seed in baseline]
    found = estimate(variant[seed] - baseline[seed] for seed in both)
    if found.half is None:
        return Difference(found, said=f"{found.count} pair{'s' * (found.count != 1)} of seeds")
    scale = max(abs(side[seed]) for side in (variant, baseline) for seed in both if math.isfinite(side[seed]))
    if found.half <= 1e-12 * scale:
        same = abs(found.mean) <= 1e-12 * scale
        return Difference(replace(found, half=0.0, mean=0.0 if same else found.mean), 1.0 if same else None, said=CONSTANT)
    t = abs(found.mean) / found.half * _quantile(found.count)
    return Difference(found, float(2 * stats.t.sf(t, found.count - 1)))


def holm(values: list[float]) -> list[float]:
    """Return p-values corrected by Holm's method for being several."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, so_far = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        so_far = max(so_far, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = so_far
    return corrected


def judged(differences: dict[str, Difference], name: str) -> dict[str, Difference]:
    """Correct the p-values of one column of one table, and say of each difference what it is, as far as a metric tells."""
    tested = [variant for variant, found in differences.items() if found.p is not None]
    corrected = dict(zip(tested, holm([differences[variant].p for variant in tested]), strict=True))
    sign = direction(name)
    found = dict(differences)
    for variant, p in corrected.items():
        outside = BETTER if differences[variant].estimate.mean * sign > 0 else WORSE
        verdict = WITHIN if p >= ALPHA else outside
        found[variant] = replace(differences[variant], corrected=p, said=verdict if sign else "")
    return found


def dominated(quality: dict[str, dict[int, float]], cost: dict[str, float], name: str) -> set[str]:
    """Return the variants beside which another costs no more and is better outside the noise, pair by pair."""
    sign = direction(name)

    def beats(one: str, other: str) -> bool:
        found = difference(quality[one], quality[other])
        return found.p is not None and found.p < ALPHA and found.estimate.mean * sign > 0

    return {variant for variant in cost for other in cost
            if other != variant and cost[other] <= cost[variant] and beats(other, variant)}
