"""One run's training beside others: the steps are those of a shared base, the looks and reports are the run's own.

Knows hosts and MLflow, as `train.worker` does. Does not know where the base is.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from train.control import Progress
from train.host import Host
from train.record import run_logger
from train.tally import Tally, last_logged_step
from train.worker import Task


class Base(Protocol):
    """What a run asks of `train.shared.SharedBase`, here or in another process on the same machine."""

    def join(self, trial_id: str, config: Any, checkpoint: Path | None = None) -> dict[str, float]:
        """Add an adapter; return its position."""

    def advance(self, trial_id: str, num_steps: int) -> dict[str, float]:
        """Take steps."""

    def evaluate(self, trial_id: str) -> float:
        """Return the held-out loss."""

    def save(self, trial_id: str, folder: Path) -> None:
        """Write a checkpoint."""

    def leave(self, trial_id: str) -> None:
        """Take the adapter away."""


def train_beside(base: Base, task: Task, host: Host, checkpoint: Any = None) -> None:
    """Train one adapter on a shared base, from Ray's checkpoint if there is one; measured and saved every so many steps.

    Raises:
        TandemError: What the user can mend.
    """
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    log = run_logger(task.run_id, chatbot=task.config.name)
    client, every = MlflowClient(task.mlflow_url), task.config.train.checkpoint_every_steps
    if checkpoint:
        with checkpoint.as_directory() as folder:
            found = base.join(task.run_id, task.config, Path(folder))
    else:
        found = base.join(task.run_id, task.config)
    tally = Tally(task.config.name)
    tally.begin(int(found["step"]), int(found["num_tokens"]), last_logged_step(client, task.run_id))
    try:
        while found["step"] < found["num_steps"]:
            found = base.advance(task.run_id, every - int(found["step"]) % every)
            found["eval_loss"] = base.evaluate(task.run_id)
            step, now_ms = int(found["step"]), int(time.time() * 1000)
            curves = [Metric(name, found[name], now_ms, step) for name in ("loss", "eval_loss", "tokens_per_s")]
            client.log_batch(task.run_id, metrics=curves)
            tally.count(step, int(found["num_tokens"]))
            tally.show(found)
            log.info("trained", **found)
            with tempfile.TemporaryDirectory(prefix="tandem-train-") as scratch:
                folder = Path(scratch) / "checkpoint"
                base.save(task.run_id, folder)
                host.report({**found, "saved_s": time.time()}, folder)
            progress = Progress(step, int(found["num_steps"]), found["loss"], found["tokens_per_s"], found["eval_loss"])
            if host.send(progress):
                return
    finally:
        base.leave(task.run_id)
