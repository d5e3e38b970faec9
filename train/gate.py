"""The gate: whether a version may be let in, from its scores alone.

Knows rules and numbers. Does not know how they were measured, or what becomes of the version.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from configs.schema import GateConfig, GateRule
from train.scores import Interval, shown

RELATIVE = ("must_beat_live_by", "may_lose_at_most")
NOTHING_LIVE = "nothing to compare with is live"
OTHER_BASE = "what is live was made for another base model, and cannot be compared"


@dataclass(frozen=True)
class Check:
    """One rule, what it wants and what was found."""

    metric: str
    rule: str
    bound: float
    found: float | None
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        """Say it in a line."""
        found = self.note if self.found is None else shown(self.metric, self.found, sign=self.rule in RELATIVE)
        return f"{self.metric} {self.rule}={self.bound:g}: {found}"


@dataclass(frozen=True)
class Decision:
    """Whether a version passed, and every check that led to it."""

    passed: bool
    checks: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def decide(gate: GateConfig, scores: Mapping[str, Interval], differences: Mapping[str, Interval] | str) -> Decision:
    """Hold scores against the rules.

    Args:
        gate: The rules; with `certain` the worse end of each interval is judged, else the value.
        scores: The version's own.
        differences: By how much it is better than the live version; or NOTHING_LIVE, where what is relative holds, or OTHER_BASE, where
            nobody knows whether it beats what is live.
    """
    checks = tuple(
        check
        for metric, rule in gate.metrics.items()
        for check in (*_absolute(metric, rule, gate.certain, scores.get(metric)), *_relative(metric, rule, gate.certain, differences))
    )
    return Decision(all(check.passed for check in checks), checks)


def _absolute(metric: str, rule: GateRule, certain: bool, score: Interval | None) -> Iterator[Check]:
    if rule.minimum is not None:
        found = _least(score, certain)
        yield _check(metric, "minimum", rule.minimum, found, found is not None and found >= rule.minimum)
    if rule.maximum is not None:
        found = _most(score, certain)
        yield _check(metric, "maximum", rule.maximum, found, found is not None and found <= rule.maximum)


def _relative(metric: str, rule: GateRule, certain: bool, differences: Mapping[str, Interval] | str) -> Iterator[Check]:
    bounds = {"must_beat_live_by": rule.must_beat_live_by, "may_lose_at_most": rule.may_lose_at_most}
    for name, bound in bounds.items():
        if bound is None:
            continue
        if isinstance(differences, str):
            yield Check(metric, name, bound, None, name == "may_lose_at_most" or differences == NOTHING_LIVE, differences)
            continue
        found = _least(differences.get(metric), certain)
        least = bound if name == "must_beat_live_by" else -bound
        yield _check(metric, name, bound, found, found is not None and found >= least)


def _least(found: Interval | None, certain: bool) -> float | None:
    return None if found is None else found.low if certain else found.value


def _most(found: Interval | None, certain: bool) -> float | None:
    return None if found is None else found.high if certain else found.value


def _check(metric: str, rule: str, bound: float, found: float | None, passed: bool) -> Check:
    return Check(metric, rule, bound, found, passed, "not measured" if found is None else "")
