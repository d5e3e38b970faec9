"""What became of a sweep's trials, as rows of plain values: a table, the best one, and the price.

Knows Ray Tune's results. Does not know where they are written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from configs.errors import last_lines
from configs.schema import SweepConfig
from tune.looks import REASON, SETTINGS, TRIAL, Looks
from tune.record import NUM_TOKENS, trial_number


@dataclass(frozen=True)
class Row:
    """One trial: its settings, how far it came, its best score, and why it failed if it did.

    Where a trial copied another one midway, its looks are those of the adapter that it has, its tokens those that it trained itself, and
    its settings those with which its best checkpoint was trained.
    A loss that is no finite number is no score: a trial that diverges has that of a look before, or none.
    """

    name: str
    settings: dict[str, Any]
    looks: Looks
    score: float | None = None
    reason: str | None = None
    checkpoint: Any = None
    """Ray's checkpoint of the best score, wherever it lies; None where there is none."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was reported with it."""
    own_tokens: int | None = None
    """Tokens that it trained; if None, all that its looks tell of."""

    @property
    def number(self) -> int:
        """The trial's number, from 1."""
        return trial_number(self.name)

    @property
    def share(self) -> float:
        """How far the trial came, as a share of its run."""
        return self.looks[-1]["share"] if self.looks else 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that it trained."""
        if self.own_tokens is not None:
            return self.own_tokens
        return int(self.looks[-1]["num_tokens"]) if self.looks else 0

    @property
    def state(self) -> str:
        """Its fate in a word."""
        return "failed" if self.reason else "finished" if self.share >= 1 else "stopped"


def read_rows(results: Any, sweep: SweepConfig) -> tuple[Row, ...]:
    """Return a row for each trial that was begun, by number."""
    trials = results._experiment_analysis.trials  # a result that was never reported has no settings of its own
    rows = [_row(trial, result, sweep) for trial, result in zip(trials, results, strict=True)]
    return tuple(sorted((row for row in rows if row.looks or row.reason), key=lambda row: row.number))


def _row(trial: Any, result: Any, sweep: SweepConfig) -> Row:
    metrics, name = result.metrics or {}, str(trial)
    if metrics.get(TRIAL, name) != name:
        metrics = {}  # of the trial that it copied, and it has had no look since
    reason = metrics.get(REASON) or (last_lines(str(result.error), 1).strip() if result.error else None)
    kept = [(checkpoint, found) for checkpoint, found in result.best_checkpoints or []]
    looks: Looks = metrics.get("looks") or (max((entry[1]["looks"] for entry in kept), key=len, default=[]))
    choose = min if sweep.mode == "min" else max
    measured = (entry for entry in kept if math.isfinite(entry[1][sweep.metric]))
    best: tuple[Any, dict[str, Any]] = choose(measured, key=lambda entry: entry[1][sweep.metric], default=(None, {}))
    checkpoint, found = best
    seen = choose((look[sweep.metric] for look in looks if math.isfinite(look[sweep.metric])), default=None)
    if looks and seen is None and not reason:
        reason = f"it diverged: its {sweep.metric} was {looks[-1][sweep.metric]} at every look"
    settings, score = found.get(SETTINGS, trial.config[SETTINGS]), found.get(sweep.metric, seen)
    tokens = [told[NUM_TOKENS] for told in (metrics, *(entry[1] for entry in kept)) if TRIAL in told]
    return Row(name, settings, looks, score, reason, checkpoint, found, max(tokens, default=None))


def best_row(rows: Sequence[Row], sweep: SweepConfig) -> Row | None:
    """Return the trial with the best score that was not called failed; None where none has a score."""
    scored = [row for row in rows if row.score is not None and row.checkpoint and not row.reason]
    choose = min if sweep.mode == "min" else max
    return choose(scored, key=lambda row: row.score or 0.0, default=None)


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return what the sweep cost, and what the same trials would have cost, each trained to its end."""
    spent = sum(row.num_tokens for row in rows)
    full = sum(row.looks[-1]["num_tokens"] / row.share for row in rows if row.looks)
    fates = [row.state for row in rows]
    return {
        "num_trials": len(rows),
        "num_finished": fates.count("finished"),
        "num_stopped": fates.count("stopped"),
        "num_failed": fates.count("failed"),
        "num_tokens": spent,
        "num_tokens_full_grid": round(full),
        "share_of_full_grid": spent / full if full else 0.0,
    }


def table(rows: Sequence[Row], sweep: SweepConfig) -> Table:
    """Return the trials as a table, the best first and the failed last."""
    sign = 1 if sweep.mode == "min" else -1
    made = Table("trial", *(path.removeprefix("train.") for path in sweep.space), sweep.metric, "of a run", "tokens", "", box=None)
    for row in sorted(rows, key=lambda row: (bool(row.reason), row.score is None, sign * (row.score or 0))):
        score = "" if row.score is None else f"{row.score:.4f}"
        settings = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.settings.values())
        made.add_row(str(row.number), *settings, score, f"{row.share:.0%}", f"{row.num_tokens:,}", row.reason or row.state)
    return made
