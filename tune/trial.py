"""One trial on its card: the training function of `python -m train`, with Ray Tune as its host.

Knows what a trial is given and what it reports. Does not know which trials there are, or how they are compared.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from cluster.logs import set_up
from cluster.placement import num_threads
from cluster.registry import Registry
from configs.errors import TandemError
from configs.loader import with_settings
from configs.schema import ChatbotConfig
from train.control import Progress
from train.host import Host
from train.memory import is_out_of_memory
from train.worker import Task, train_adapter
from tune.looks import SETTINGS, TRIAL, failure, newest_tokens, read_looks
from tune.record import NUM_TOKENS, Spent, trial_run

TrainTrial = Callable[[Task, Host, Any], None]


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep share; plain values, so that Ray can send it."""

    task: Task
    """The task of a run with the config's own settings; its run is the sweep's, and each trial's is nested in it."""
    num_rows: int
    num_cards: int
    train_trial: TrainTrial = train_adapter
    """Trains one trial on its card alone. Trials that share a base would have another one here."""


class TrialHost:
    """A trial of Ray Tune, on one card."""

    num_workers = 1
    is_first = True

    def __init__(self, name: str, settings: dict[str, Any], spent: Spent) -> None:
        self.told_by, self.spent = {TRIAL: name, SETTINGS: settings}, spent

    def report(self, metrics: dict[str, float], folder: Path) -> None:
        """Report a look with its checkpoint; here Tune ends or pauses a trial."""
        from ray import tune as ray_tune

        checkpoint = ray_tune.Checkpoint.from_directory(str(folder))
        looks = read_looks(folder)
        told = {"share": looks[-1]["share"], "looks": looks, NUM_TOKENS: self.spent.add(newest_tokens(looks)), **self.told_by}
        ray_tune.report({**metrics, **told}, checkpoint=checkpoint)

    def send(self, progress: Progress) -> str | None:
        """Go on: who stops a trial does it at a look."""
        return None


def run_trial(drawn: dict[str, Any], sweep: Sweep) -> None:
    """Train one trial, from its checkpoint if it has one.

    What cannot be mended by trying again ends as a result with its reason; a worker that dies is Tune's to start again.
    """
    from ray import tune as ray_tune

    set_up()
    task, tune = sweep.task, sweep.task.config.tune
    _make_room(sweep.num_cards)
    name = ray_tune.get_context().get_trial_name()
    try:
        run_id = trial_run(task.mlflow_url, task.run_id, name, drawn["settings"])
        config = trial_config(task.config, drawn["settings"], sweep.num_rows)
        if task.sizing:
            config, _ = task.sizing.settle(config)
        host = TrialHost(name, drawn["settings"], Spent(Registry(task.mlflow_url).client, run_id))
        sweep.train_trial(replace(task, config=config, run_id=run_id), host, ray_tune.get_checkpoint())
    except TandemError as error:
        ray_tune.report(failure(f"{error.what}: {error.why}", tune.metric, tune.mode))
    except RuntimeError as error:
        reason = memory_reason(error)
        if not reason:
            raise
        ray_tune.report(failure(reason, tune.metric, tune.mode))


def memory_reason(error: RuntimeError) -> str | None:
    """Return what was too large, if memory did not reach; an error from a base in another process begins with that one's traceback."""
    cause = getattr(error, "cause", error)
    return f"out of memory: {str(cause).partition(chr(10))[0]}" if is_out_of_memory(cause) else None


def trial_config(config: ChatbotConfig, settings: dict[str, Any], num_rows: int) -> ChatbotConfig:
    """Return a trial's config: what was drawn for it, and looks at which it is measured and saved.

    Raises:
        ConfigError: What was drawn does not fit together.
    """
    drawn = with_settings(config, settings)
    every = ceil(drawn.train.count_steps(num_rows) / config.tune.num_looks)
    measured = {
        "train.eval_every_steps": every,
        "train.checkpoint_every_steps": every,
        "train.log_every_steps": min(every, config.train.log_every_steps),
        "train.early_stopping_patience": None,
    }
    return with_settings(drawn, measured)


def _make_room(num_cards: int) -> None:
    """Take this trial's share of the cores, and give back what an earlier trial in this process held."""
    import ray
    import torch

    gc.collect()
    # glibc keeps what was freed for the thread that had it, and each trial is a new one: 0.3 GB a trial of the 135M model.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        threads = num_threads(ray.get_runtime_context().get_node_labels(), num_cards)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
