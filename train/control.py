"""The line between a run's driver and its workers: progress goes up, the wish to stop comes down.

Knows one named Ray actor for each run. Does not know what a step is.
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.session import RAY_NAMESPACE
from configs.errors import TandemError


@dataclass(frozen=True)
class Progress:
    """How far a run is; losses are means over the tokens since the last report."""

    step: int
    num_steps: int
    loss: float | None = None
    tokens_per_s: float | None = None
    eval_loss: float | None = None


class Control:
    """State of one run, kept in an actor of its own."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.stop_reason: str | None = None
        self.refusal: TandemError | None = None

    def report(self, progress: Progress) -> str | None:
        """Take a worker's progress; return why it should stop, if it should."""
        self.progress = progress
        return self.stop_reason

    def read(self) -> Progress | None:
        """Return the newest progress."""
        return self.progress

    def ask_to_stop(self, reason: str) -> None:
        """Let the workers save and leave, at the latest after the step they are in."""
        self.stop_reason = self.stop_reason or reason

    def refuse(self, error: TandemError) -> None:
        """Take what a worker found that the user can mend."""
        self.refusal = self.refusal or error

    def read_refusal(self) -> TandemError | None:
        """Return what keeps the run from being trained, if anything does."""
        return self.refusal


def make_control(run_id: str) -> Any:
    """Start the actor of a run; it takes no card, and ends with its driver, with which it is: another card that dies leaves it alone."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # soft, a busy one would send it elsewhere
    settings = {"name": f"run-{run_id}", "namespace": RAY_NAMESPACE, "num_cpus": 0, "get_if_exists": True}
    return ray.remote(Control).options(scheduling_strategy=here, **settings).remote()


def find_control(run_id: str) -> Any:
    """Return the actor of a run, from anywhere in the cluster."""
    return ray.get_actor(f"run-{run_id}", namespace=RAY_NAMESPACE)


def is_going_on(run_id: str) -> bool:
    """Whether a driver is at work on the run: its actor ends with it."""
    try:
        find_control(run_id)
    except ValueError:
        return False
    return True
