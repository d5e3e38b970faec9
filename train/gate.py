"""The gate: whether a version may be let in, from its scores alone.

Knows rules and numbers. Does not know how they were measured, or what becomes of the version.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from configs.schema import GateConfig, GateRule
from train.scores import Interval, shown

RELATIVE = ("must_beat_live_by", "may_lose_at_most")


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


def decide(gate: GateConfig, scores: Mapping[str, Interval], differences: Mapping[str, Interval] | None) -> Decision:
    """Hold scores against the rules.

    Args:
        gate: The rules; with `certain` the worse end of each interval is judged, else the value.
        scores: The version's own.
        differences: By how much it is better than the live version; None where nothing is live, and what is relative then holds.
    """
    checks = tuple(check for metric, rule in gate.metrics.items() for check in _checks(metric, rule, gate.certain, scores, differences))
    return Decision(all(check.passed for check in checks), checks)


def _checks(
    metric: str, rule: GateRule, certain: bool, scores: Mapping[str, Interval], differences: Mapping[str, Interval] | None
) -> Iterator[Check]:
    score = scores.get(metric)
    if rule.minimum is not None:
        yield _check(metric, "minimum", rule.minimum, rule.minimum, _least(score, certain))
    if rule.maximum is not None:
        yield _check(metric, "maximum", rule.maximum, -rule.maximum, _most(score, certain), sign=-1)
    for name, bound, least in (
        ("must_beat_live_by", rule.must_beat_live_by, rule.must_beat_live_by),
        ("may_lose_at_most", rule.may_lose_at_most, -(rule.may_lose_at_most or 0.0)),
    ):
        if bound is not None and differences is None:
            yield Check(metric, name, bound, None, True, "nothing to compare with is live")
        elif bound is not None and differences is not None and least is not None:
            yield _check(metric, name, bound, least, _least(differences.get(metric), certain))


def _least(found: Interval | None, certain: bool) -> float | None:
    return None if found is None else found.low if certain else found.value


def _most(found: Interval | None, certain: bool) -> float | None:
    return None if found is None else found.high if certain else found.value


def _check(metric: str, rule: str, bound: float, least: float, found: float | None, sign: int = 1) -> Check:
    if found is None:
        return Check(metric, rule, bound, None, False, "not measured")
    return Check(metric, rule, bound, found, sign * found >= least)
