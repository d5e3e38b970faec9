"""Metrics of a version, each with a bootstrap interval: their values, and the differences between two versions.

Knows numbers, question by question. Does not know how an answer was come by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.errors import RunError
from configs.schema import METRICS

PERPLEXITY, ACCURACY, EXACT, GENERAL, FORGOTTEN, JUDGE = METRICS
LOWER_IS_BETTER = frozenset({PERPLEXITY, FORGOTTEN})
CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
BATCH = 100  # resamples drawn at once; all of them, over ten thousand questions, would take gigabytes
MAX_LOGARITHM = 700.0  # e to more than that is no number


@dataclass(frozen=True)
class Interval:
    """A value, and the ends of its 95 % interval; of one question alone there is none, and both ends are the value."""

    value: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True)
class Sample:
    """One metric's parts, question by question: it is the sum of `tops` over that of `bottoms`, for perplexity e to that."""

    metric: str
    tops: tuple[float, ...]
    bottoms: tuple[float, ...]
    groups: tuple[str | None, ...] = ()
    """What each question is a wording of, if of anything; empty where no two belong together."""

    @classmethod
    def of_shares(cls, metric: str, values: Sequence[float], groups: Sequence[str | None] = ()) -> "Sample":
        """Return the sample of a mean."""
        return cls(metric, tuple(map(float, values)), (1.0,) * len(values), tuple(groups))

    def drawn(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return tops and bottoms of what is drawn as one: wordings of one question succeed or fail together, and are less news."""
        names = [group or number for number, group in enumerate(self.groups)] or list(range(len(self.tops)))
        sums: dict[str | int, tuple[float, float]] = {}
        for name, top, bottom in zip(names, self.tops, self.bottoms, strict=True):
            known_top, known_bottom = sums.get(name, (0.0, 0.0))
            sums[name] = known_top + top, known_bottom + bottom
        return tuple(top for top, _ in sums.values()), tuple(bottom for _, bottom in sums.values())


def measure(sample: Sample) -> Interval:
    """Return a metric's value with its interval; questions, or groups of them, are drawn again with replacement."""
    return _bootstrap(sample.drawn(), lambda tops, bottoms: _value(sample.metric, tops, bottoms), len(sample.tops))


def compare(new: Sample, old: Sample) -> Interval:
    """Return by how much `new` is better than `old` on the same questions, drawn in pairs; over 0 is better, also where lower is."""
    if new.metric != old.metric or len(new.tops) != len(old.tops):
        raise RunError(f"{new.metric} cannot be compared", f"{len(new.tops)} questions against {len(old.tops)}", "evaluate again")
    sign = -1.0 if new.metric in LOWER_IS_BETTER else 1.0

    def better_by(new_tops: Any, new_bottoms: Any, old_tops: Any, old_bottoms: Any) -> Any:
        return sign * (_value(new.metric, new_tops, new_bottoms) - _value(new.metric, old_tops, old_bottoms))

    return _bootstrap((*new.drawn(), *replace(old, groups=new.groups).drawn()), better_by, len(new.tops))


def measure_all(samples: Mapping[str, Sample]) -> dict[str, Interval]:
    """Return every metric with its interval; one without questions is left out."""
    return {name: measure(sample) for name, sample in samples.items() if sample.tops}


def compare_all(new: Mapping[str, Sample], old: Mapping[str, Sample]) -> dict[str, Interval]:
    """Return the differences in all metrics that both versions have."""
    return {name: compare(sample, old[name]) for name, sample in new.items() if sample.tops and name in old and old[name].tops}


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is shown in percent."""
    return metric != PERPLEXITY


def shown(metric: str, number: float, sign: bool = False) -> str:
    """Write a metric's value, or a difference with its sign, for people."""
    form = "+" if sign else ""
    return f"{100 * number:{form}.1f}%" if is_share(metric) else f"{number:{form}.3f}"


def shown_interval(metric: str, found: Interval, sign: bool = False) -> str:
    """Write a value with its interval for people."""
    return f"{shown(metric, found.value, sign)} ({shown(metric, found.low, sign)} to {shown(metric, found.high, sign)})"


def _value(metric: str, tops: Any, bottoms: Any) -> Any:
    share = tops.sum(axis=-1) / bottoms.sum(axis=-1)
    return np.exp(np.minimum(share, MAX_LOGARITHM)) if metric == PERPLEXITY else share


def _bootstrap(parts: Sequence[Sequence[float]], statistic: Any, num_questions: int) -> Interval:
    from scipy.stats import bootstrap

    data = tuple(np.asarray(part, dtype=float) for part in parts)
    value = float(statistic(*data))
    if len(data[0]) < 2:
        return Interval(value, value, value, num_questions)
    found = bootstrap(
        data,
        lambda *drawn, axis: statistic(*drawn),  # the statistic always works along the last axis, as scipy asks for
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), num_questions)
