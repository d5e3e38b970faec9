"""What is shown while a sweep goes on: on a terminal a table that changes in place, else one line for each trial that ends.

Knows rich, and what a trial of Tune's says of itself. Does not know who stops one.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from rich.live import Live
from rich.table import Table

from configs.cli import console
from configs.schema import ChatbotConfig, SweepConfig
from tune.looks import REASON
from tune.record import trial_number

MAX_LINES = 24
WORDS = {"PENDING": "waits", "RUNNING": "trains", "PAUSED": "paused", "TERMINATED": "ended", "ERROR": "failed"}


class Show(Protocol):
    """Is told of all trials whenever one of them has something new."""

    def trials(self, trials: Sequence[Any]) -> None:
        """Show how far they are."""

    def ended(self, trial: Any) -> None:
        """Show one that ended."""

    def close(self) -> None:
        """Show no more."""


class Lines:
    """Shows a sweep on the console."""

    live: ClassVar[Live | None] = None  # one for the process: Tune keeps this object with a sweep's state, and makes another from it

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

    def ended(self, trial: Any) -> None:
        """Print a line."""
        number, _, share, score, settings = _words(trial, self.sweep)
        reason = (trial.last_result or {}).get(REASON) or ("its worker failed" if trial.status == "ERROR" else "")
        parts = [f"trial {number}", settings, f"{share} of a run", f"{self.sweep.metric} {score}" if score else "", reason]
        console.print(f"[dim]tune[/]   {' · '.join(filter(None, parts))}")

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
