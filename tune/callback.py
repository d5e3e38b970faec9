"""The line from Ray Tune's driver to whoever shows a sweep.

Knows Tune's callbacks. Does not know what is shown.
"""

from typing import Any

from ray.tune import Callback

from tune.progress import Show


class ProgressCallback(Callback):  # type: ignore[misc]
    """Passes on what Tune tells; Tune keeps it with the sweep's state, without what is on the screen."""

    def __init__(self, show: Show) -> None:
        self.show = show

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that it is at work."""
        self.show.trials(trials)

    def on_trial_save(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show its newest look."""
        self.show.looked(trial, trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show its end."""
        self.show.ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show its failure."""
        self.show.ended(trial)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Leave the last state on the screen."""
        self.show.close()
