"""Where training runs: it takes checkpoints and progress, and says when to stop.

Knows Ray Train's report and the run's control. Does not know what is trained. A sweep has a host of its own for its trials.
"""

from pathlib import Path
from typing import Any, Protocol

from train.control import Progress


class Host(Protocol):
    """What the training function asks of the place that it runs in."""

    num_workers: int
    is_first: bool

    def report(self, metrics: dict[str, float], folder: Path) -> None:
        """Keep a checkpoint with its metrics; the folder is gone afterwards."""

    def send(self, progress: Progress) -> str | None:
        """Take the progress of a step; return why to stop, if the run should."""


class TrainHost:
    """A worker of Ray Train, with its driver behind the run's control."""

    def __init__(self, control: Any, num_workers: int, is_first: bool) -> None:
        self.control, self.num_workers, self.is_first = control, num_workers, is_first

    def report(self, metrics: dict[str, float], folder: Path) -> None:
        """Hand the checkpoint to Ray Train, which keeps it where a restarted worker finds it."""
        from ray import train as ray_train

        # The first worker's folder has everything, another's the state of its random numbers; Ray puts them together.
        ray_train.report(metrics, checkpoint=ray_train.Checkpoint.from_directory(str(folder)))

    def send(self, progress: Progress) -> str | None:
        """Tell the driver."""
        import ray

        reason: str | None = ray.get(self.control.report.remote(progress))
        return reason
