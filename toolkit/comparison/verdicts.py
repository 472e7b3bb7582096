"""When a number counts as right, wrong or undecided: thresholds on one side, intervals on the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from toolkit.estimate import Estimate

CONFIDENCE = 0.95
Z = float(norm.ppf(0.5 + 0.5 * CONFIDENCE))


class Verdict(Enum):
    """What an interval says of a threshold."""

    RIGHT = "right"
    WRONG = "wrong"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Thresholds:
    """What difference is small enough not to matter. The defaults are METHODS 5's; they are the user's to set.

    Attributes:
        shift: Largest |mean q - mean p| in reference sds.
        sd_ratio: Smallest and largest sd q / sd p.
        coverage_90: Smallest and largest mass of the reference in the guide's central 90 % interval.
        probability: Largest difference of an event's probability.
        elpd: Most nats that predictions of as many new observations may lose; of differences below 4 it is seldom known
            which model predicts better (Sivula, Magnusson, Matamoros & Vehtari 2020, section 5).

    Raises:
        ValueError: A threshold leaves no room around equality.
    """

    shift: float = 0.1
    sd_ratio: tuple[float, float] = (0.9, 1.11)
    coverage_90: tuple[float, float] = (0.87, 0.93)
    probability: float = 0.03
    elpd: float = 4.0

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"Expected a shift threshold above 0 (reference sds); got {self.shift}.")
        low, high = self.sd_ratio
        if not 0.0 < low < 1.0 < high < math.inf:
            raise ValueError(f"Expected sd ratio thresholds around 1, such as (0.9, 1.11); got {self.sd_ratio}.")
        low, high = self.coverage_90
        if not 0.0 < low < 0.9 < high < 1.0:
            raise ValueError(
                f"Expected coverage thresholds around 0.9 within (0, 1), such as (0.87, 0.93); got {self.coverage_90}."
            )

        if not 0.0 < self.probability < 1.0:
            raise ValueError(f"Expected a probability threshold between 0 and 1; got {self.probability}.")
        if not 0.0 < self.elpd < math.inf:
            raise ValueError(f"Expected an elpd threshold above 0 (nats); got {self.elpd}.")

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Thresholds:
        """The defaults with what is written as `name=value`, or `name=low,high` where a threshold has two ends.

        Raises:
            ValueError: A text is not of that form, names no threshold, or leaves no room around equality.
        """
        given: dict[str, float | tuple[float, ...]] = {}
        for text in texts:
            name, equals, value = (part.strip() for part in text.partition("="))
            pair = isinstance(getattr(cls, name, None), tuple) if name in _NAMES else False
            try:
                numbers = tuple(float(part) for part in value.split(","))
            except ValueError:
                numbers = ()
            if name not in _NAMES or not equals or len(numbers) != (2 if pair else 1):
                raise ValueError(
                    f"Expected a threshold such as {', '.join(_EXAMPLES)}; got '{text}': write name=value, or "
                    "name=low,high for the two with two ends."
                )
            given[name] = numbers if pair else numbers[0]
        return cls(**given)  # type: ignore[arg-type]

    def limits(self, metric: str) -> tuple[float, float] | None:
        """The least and the largest value of a metric that count as right, or None if it decides nothing."""
        location, width = (-self.shift, self.shift), self.sd_ratio
        return {
            "shift": location,
            "median_shift": location,
            "sd_ratio": width,
            "spread_ratio": width,
            "coverage_90": self.coverage_90,
            "probability": (-self.probability, self.probability),
            "predictive_loss": (-math.inf, self.elpd),
        }.get(metric)


_NAMES = tuple(Thresholds.__dataclass_fields__)
_EXAMPLES = ("shift=0.05", "sd_ratio=0.95,1.05", "coverage_90=0.88,0.92", "probability=0.02", "elpd=2")


def interval(value: float, se: float, *, log: bool = False, z: float = Z) -> tuple[float, float]:
    """The interval value ± z se; for a ratio (`log`) by the error of its logarithm, so that it stays positive."""
    if log and value > 0:
        factor = math.exp(z * se / value)
        return value / factor, value * factor
    return value - z * se, value + z * se


def judge(value: float, se: float, low: float, high: float, *, log: bool = False) -> Verdict:
    """Right if the 95 % interval of a value lies inside [low, high], wrong if outside, else cannot tell."""
    if not (math.isfinite(value) and math.isfinite(se)):
        return Verdict.CANNOT_TELL
    least, most = interval(value, se, log=log)
    if low <= least and most <= high:
        return Verdict.RIGHT
    return Verdict.WRONG if most < low or high < least else Verdict.CANNOT_TELL


def beyond(value: float, se: float, low: float, high: float, *, log: bool = False) -> float:
    """The p-value of "the value lies in [low, high]": small if the estimate lies many errors outside."""
    if not (math.isfinite(value) and math.isfinite(se)):
        return 1.0
    if log and value > 0:
        value, se, low, high = math.log(value), se / value, math.log(low), math.log(high)
    outside = max(low - value, value - high)
    if se == 0.0:
        return 0.0 if outside > 0 else 1.0
    return float(min(1.0, 2.0 * norm.sf(outside / se)))


def holm(p_values: np.ndarray, level: float = 1.0 - CONFIDENCE) -> np.ndarray:
    """Which hypotheses fall, with a chance of at most `level` that a true one is among them (Holm 1979)."""
    order = np.argsort(p_values)
    limits = level / np.arange(p_values.size, 0, -1)
    failed = np.flatnonzero(p_values[order] > limits)
    fallen = np.zeros(p_values.size, dtype=bool)
    fallen[order[: failed[0] if failed.size else p_values.size]] = True
    return fallen


def judge_rows(values: Sequence[Estimate], metrics: Sequence[str], thresholds: Thresholds) -> list[Verdict | None]:
    """The verdict of each row of one guide's table; None where the metric has no threshold or no value.

    Right by each row's own 95 % interval; wrong only if Holm's test over all rows of the guide agrees, so that
    hundreds of right quantities are not called wrong by chance.
    """
    verdicts: list[Verdict | None] = [None] * len(values)
    rows = [i for i, metric in enumerate(metrics) if thresholds.limits(metric) is not None]
    p_values = []
    for i in rows:
        low, high = thresholds.limits(metrics[i]) or (math.nan, math.nan)
        log = is_ratio(metrics[i])
        verdicts[i] = judge(*values[i], low, high, log=log)
        p_values.append(beyond(*values[i], low, high, log=log))
    for i, fallen in zip(rows, holm(np.array(p_values)), strict=True):
        if verdicts[i] is Verdict.WRONG and not fallen:
            verdicts[i] = Verdict.CANNOT_TELL
    return verdicts


def more_draws(value: Estimate, metric: str, thresholds: Thresholds, count: int = 1) -> float:
    """How many times as many draws would decide an undecided number, if it stayed where it is; infinite on an edge.

    NaN for a number that is none, which no number of draws decides.

    Args:
        value: The number.
        metric: What it is.
        thresholds: What counts as right.
        count: How many numbers Holm's test goes over: what lies outside must lie so much further out.
    """
    low, high = thresholds.limits(metric) or (math.nan, math.nan)
    centre, se = value
    if not (math.isfinite(centre) and math.isfinite(se)):
        return math.nan
    if is_ratio(metric):
        if not centre > 0:
            return math.inf
        centre, se, low, high = math.log(centre), se / centre, math.log(low), math.log(high)
    inside = min(centre - low, high - centre)
    z = Z if inside >= 0 else float(norm.isf(0.5 * (1.0 - CONFIDENCE) / max(count, 1)))
    return (z * se / abs(inside)) ** 2 if inside else math.inf


def is_ratio(metric: str) -> bool:
    """Whether a metric is a ratio, whose error belongs to its logarithm."""
    return metric.endswith("_ratio")


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Wrong if one is, right if all are (an intersection-union test: it needs no correction), else cannot tell."""
    if Verdict.WRONG in verdicts:
        return Verdict.WRONG
    return Verdict.RIGHT if verdicts and set(verdicts) == {Verdict.RIGHT} else Verdict.CANNOT_TELL


def simultaneous_z(count: int) -> float:
    """How many errors wide the intervals of `count` numbers must be to hold all at once in 95 % of studies.

    The worst of many is a maximum over noise: with a true shift of 0 and an error of 0.02, the largest of 976 is
    0.07 on average. Sidak's bound, right for normal errors of any correlation (Sidak 1967).
    """
    return float(norm.ppf(0.5 + 0.5 * CONFIDENCE ** (1.0 / max(count, 1))))


def reach(nats: float) -> tuple[float, tuple[float, float]]:
    """How far a fit that lies so many nats below its family's best may be from it: its means, and its sds.

    Under a Gaussian posterior, for a family that can be moved and scaled: a location that is s posterior sds from the
    best costs at least s^2 / 2 nats, an sd that is t times the best's at least (t^2 - 1) / 2 - log t. Elsewhere an
    orientation.

    Returns:
        The largest distance of a mean, in posterior sds; the smallest and the largest ratio t.
    """
    if not nats < math.inf:
        return math.inf, (0.0, math.inf)
    if nats <= 0.0:
        return 0.0, (1.0, 1.0)

    def above(log_ratio: float) -> float:
        return 0.5 * math.expm1(2.0 * log_ratio) - log_ratio - nats

    shift = math.sqrt(2.0 * nats)
    # Where `above` has its signs: from (t^2 - 1) / 2 >= -1/2, and from exp(2 x) >= 1 + 2 x + 2 x^2.
    low = brentq(above, -nats - 0.5, 0.0)
    high = brentq(above, 0.0, 0.5 * math.log1p(2.0 * nats + 2.0 * math.sqrt(nats)) * (1 + 1e-9))
    return shift, (math.exp(low), math.exp(high))


def beyond_reach(value: float, se: float, metric: str, nats: float, thresholds: Thresholds) -> bool:
    """Whether a number would be wrong at the family's best too, which lies at most so many nats above the fit.

    By `reach`, and by the number's 95 % interval.

    Raises:
        ValueError: The metric is neither a shift nor a ratio with a threshold.
    """
    limits = thresholds.limits(metric)
    if limits is None or metric == "coverage_90":
        raise ValueError(f"Expected a shift or a ratio that has a threshold; got '{metric}'.")
    shift, (low, high) = reach(nats)
    if is_ratio(metric):
        return judge(value, se, limits[0] * low, limits[1] * high, log=True) is Verdict.WRONG
    return judge(value, se, limits[0] - shift, limits[1] + shift) is Verdict.WRONG
