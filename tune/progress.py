"""What is shown while a sweep goes on: on a terminal a table that changes in place, else a line for each look; and in the line of jobs.

Knows rich, and what a trial of Tune's says of itself. Does not know who stops one.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cluster.job_queue import note_progress
from configs.cli import console
from configs.schema import ChatbotConfig, SweepConfig
from tune.extent import how_far
from tune.looks import REASON
from tune.record import trial_number

MAX_LINES = 24
LINE_EVERY_S = 5.0  # on average, however many trials have looks
WORDS = {"PENDING": "waits", "RUNNING": "trains", "PAUSED": "paused", "TERMINATED": "ended", "ERROR": "failed"}


class Show(Protocol):
    """Is told of all trials whenever one of them has something new."""

    def trials(self, trials: Sequence[Any]) -> None:
        """Show how far they are."""

    def looked(self, trial: Any, trials: Sequence[Any]) -> None:
        """Show one that was measured."""

    def ended(self, trial: Any) -> None:
        """Show one that ended."""

    def close(self) -> None:
        """Show no more."""


class Lines:
    """Shows a sweep on the console."""

    # Of the process: Tune keeps this object with a sweep's state, and makes another from it.
    live: ClassVar[Live | None] = None
    printed_s: ClassVar[dict[str, float]] = {}  # by trial
    noted_s: ClassVar[float] = 0.0

    def __init__(self, config: ChatbotConfig) -> None:
        self.sweep: SweepConfig = config.tune

    def trials(self, trials: Sequence[Any]) -> None:
        """Change the table in place; nothing without a terminal."""
        if not console.is_terminal:
            return
        if Lines.live is None:
            Lines.live = Live(console=console, auto_refresh=False, transient=True)
            Lines.live.start()
        made = Table("trial", "", "of a run", self.sweep.metric, "settings", box=None)
        shown = [trial for trial in trials if trial.status != "TERMINATED"][-MAX_LINES:]
        for trial in shown:
            made.add_row(*_words(trial, self.sweep))
        Lines.live.update(made, refresh=True)

    def looked(self, trial: Any, trials: Sequence[Any]) -> None:
        """Print a line without a terminal, if this trial's last one is some time ago; tell the line of jobs how far the sweep is."""
        self.trials(trials)
        now_s, num_running = time.monotonic(), sum(other.status == "RUNNING" for other in trials)
        if not console.is_terminal and now_s - Lines.printed_s.get(str(trial), -math.inf) >= LINE_EVERY_S * num_running:
            Lines.printed_s[str(trial)] = now_s
            self._print(trial)
        if now_s - Lines.noted_s >= LINE_EVERY_S:
            Lines.noted_s = now_s
            note_progress(*how_far([other.last_result or {} for other in trials], self.sweep, self.sweep.trials_per_card or 1))

    def ended(self, trial: Any) -> None:
        """Print a line."""
        self._print(trial, (trial.last_result or {}).get(REASON) or ("its worker failed" if trial.status == "ERROR" else "ended"))

    def _print(self, trial: Any, fate: str = "") -> None:
        number, _, share, score, settings = _words(trial, self.sweep)
        parts = [f"trial {number}", settings, f"{share} of a run", f"{self.sweep.metric} {score}" if score else "", fate]
        console.print(f"[dim]tune[/]   {escape(' · '.join(filter(None, parts)))}", soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if Lines.live:
            Lines.live.stop()
            Lines.live = None


def _words(trial: Any, sweep: SweepConfig) -> tuple[str, str, str, str, str]:
    result = trial.last_result or {}
    looks = result.get("looks") or [{"share": 0.0}]
    score = looks[-1].get(sweep.metric)
    settings = " ".join(
        f"{path.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{path.rpartition('.')[2]}={value}"
        for path, value in trial.config["settings"].items()
    )
    return (
        str(trial_number(str(trial))),
        WORDS.get(trial.status, trial.status),
        f"{looks[-1]['share']:.0%}",
        "" if score is None else f"{score:.4f}",
        settings,
    )
