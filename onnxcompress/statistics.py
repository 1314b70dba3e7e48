"""The statistics of paired timings: one estimate from several sessions, its interval, and what it allows to say.

Two sessions on the same model differ, because memory is laid out anew each time. So the unit is the session, not the
pair: each session gives one number (:func:`session_log_ratio`), and the interval is that of the sessions' centre
(:func:`midmean_interval`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEWEST_SESSIONS",
    "SAME_WITHIN",
    "Verdict",
    "midmean",
    "midmean_interval",
    "percentile",
    "percentile_samples",
    "sequential_interval",
    "session_log_ratio",
    "student_quantile",
    "verdict",
]

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNDECIDED"]

#: two models are the same where the whole interval of their ratio lies within 1 +- this
SAME_WITHIN = 0.02
#: fewest sessions that an interval can be computed from, see :func:`midmean_interval`
FEWEST_SESSIONS = 6
#: half-width of the interval of the log ratio at which more sessions would tell nothing that anybody needs
NARROW = 0.005
#: the same where the verdict cannot change any more
NARROW_ENOUGH = 0.015


def percentile_samples(q: float) -> int:
    """Least number of samples that supports the ``q``-th percentile: 29 for 90, 59 for 95, 299 for 99.

    With fewer samples the largest one lies below the true percentile with more than 5 % probability, so that the
    sample has nothing to say about it. For the lower half the same holds of the smallest one.
    """
    share = max(q, 100.0 - q) / 100.0
    return math.ceil(math.log(0.05) / math.log(share))


def percentile(values: NDArray[Any], q: float) -> float | None:
    """The ``q``-th percentile of ``values``; None where there are too few for it, see :func:`percentile_samples`."""
    if values.size < percentile_samples(q):
        return None
    return float(np.percentile(values, q))


def session_log_ratio(log_ratios: NDArray[np.float64], reference_first: NDArray[np.bool_]) -> float:
    """The log ratio of one session: the medians of both orders, averaged.

    Whoever runs second in a pair may find warmer or colder caches. Over both orders that cancels, while one median
    over all pairs would fall anywhere between the two groups.
    """
    both = [log_ratios[reference_first], log_ratios[~reference_first]]
    return float(np.mean([np.median(group) for group in both if group.size]))


def midmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the middle half along the last axis; a quarter of the values may be wild without harm."""
    count = values.shape[-1]
    cut = count // 4
    middle: NDArray[np.float64] = np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)
    return middle


def midmean_interval(
    values: NDArray[np.float64], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(estimate, low, high): the midmean of ``values`` and its bootstrap interval.

    The expanded percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 5.3:
    resampling n values understates their spread by sqrt((n - 1) / n) and a normal quantile by Student's, so that the
    plain percentile interval of ten values covers 92 % where 95 % was asked for. The tails are set to what makes up for
    both. Below six values no interval inside their range can cover 95 %; then it is their range at best.
    """
    count = values.size
    estimate = float(midmean(values))
    if count < 2:
        return estimate, -math.inf, math.inf
    tail = (1.0 - confidence) / 2.0
    reach = math.sqrt(count / (count - 1)) * student_quantile(1.0 - tail, count - 1)
    tail = NormalDist().cdf(-reach)
    chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
    low, high = np.quantile(midmean(values[chosen]), [tail, 1.0 - tail])
    return estimate, float(low), float(high)


def sequential_interval(
    log_ratios: Iterable[float], fewest: int, out_of_time: Callable[[int], bool], *, seed: int = 0
) -> tuple[float, float, float, list[float]]:
    """(estimate, low, high, the log ratios used): sessions are drawn until their interval settles or time is out.

    The interval is looked at after ``fewest`` sessions and then after each quarter more: many looks would find many
    false differences. For the same reason 1 lying outside is no reason to stop; see :func:`_is_settled`.
    ``out_of_time`` is asked after each session, given their number.
    """
    used: list[float] = []
    checkpoint = fewest
    for value in log_ratios:
        used.append(value)
        late = out_of_time(len(used))
        if not late and len(used) < checkpoint:
            continue
        checkpoint = math.ceil(len(used) * 1.25)
        estimate, low, high = midmean_interval(np.array(used), seed=seed)
        if late or _is_settled(low, high):
            return estimate, low, high, used
    raise ValueError("the log ratios ended before the interval settled; expected an endless source")


def _is_settled(low: float, high: float) -> bool:
    """True where an interval of log ratios is narrow enough.

    It may be wider where it is clear of everything that counts as the same, by its own half-width again: there the
    verdict is decided, equal models hardly ever get there by chance, and differences are not overstated much.
    """
    half = (high - low) / 2
    far = low - half > math.log(1 + SAME_WITHIN) or high + half < math.log(1 - SAME_WITHIN)
    return half <= NARROW or (far and half <= NARROW_ENOUGH)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, to about six digits.

    With t = sqrt(degrees) tan(angle) the density becomes cos(angle)^(degrees - 1), which is summed on a grid.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.cumsum((density[1:] + density[:-1]) / 2)
    angle = np.interp(probability, below / below[-1], angles[1:])
    return math.sqrt(degrees) * math.tan(float(angle))


def verdict(low: float, high: float) -> Verdict:
    """What the interval of time of the reference / time of the candidate says about the candidate.

    SAME: wholly within 1 +- ``SAME_WITHIN``, be it above 1 or not. FASTER, SLOWER: wholly on one side of 1.
    """
    if low >= 1.0 - SAME_WITHIN and high <= 1.0 + SAME_WITHIN:
        return "SAME"
    if low > 1.0:
        return "FASTER"
    if high < 1.0:
        return "SLOWER"
    return "UNDECIDED"
