"""Trials that share a card: an actor holds one base there, and the trials, light processes beside it, ask it for steps.

Knows Ray's actors and how a card is divided. Does not know the step, or who goes on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from cluster.placement import card_selector
from configs.errors import RunError
from configs.schema import ChatbotConfig
from data.prepare import Prepared
from train.host import Host
from train.worker import Task

NUM_TRIALS = 4
MAX_TOKENS = 2048  # of a step: at 1,500, four share an H100 at three times the pace of one after another; at 6,000 one fills it by itself
BASES_SHARE = 0.6  # of a card: over half, so that no card has two; whoever wants a whole card waits for both
OF_THE_BASE = ("train.quantization", "train.double_quantization", "train.num_workers")


def count_beside(config: ChatbotConfig, data: Prepared, on_gpu: bool) -> int:
    """Return how many trials are to share a card: as many as the config says, or several where that is quicker.

    Raises:
        RunError: The config wants what cannot be.
    """
    reason = why_not(config)
    wanted = config.tune.trials_per_card
    if wanted and wanted > 1 and reason:
        raise RunError(f"tune.trials_per_card={wanted} cannot be", reason, "tune.trials_per_card=1")
    if wanted:
        return wanted
    num_tokens = config.train.batch_size * data.num_train_tokens / data.num_train
    return NUM_TRIALS if on_gpu and not reason and num_tokens <= MAX_TOKENS else 1


def why_not(config: ChatbotConfig) -> str | None:
    """Tell why this sweep's trials cannot share a base, as far as the config says; the base itself may refuse too."""
    from train.group import why_apart

    for path, dimension in config.tune.space.items():
        if path in OF_THE_BASE or not path.startswith("train."):
            return f"{path} differs between trials, and a base has one"
        if path == "train.lora.dropout" and dimension.choice != [0]:
            return "train.lora.dropout needs a base of its own"
    return why_apart(config)


class BaseActor:
    """One base on one card: `train.shared.SharedBase` in a process of its own."""

    def load(self, task: Task, num_cards: int) -> str:
        """Load the base; return the id of the node that it is on."""
        import torch

        from train.shared import share_base

        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, (psutil.cpu_count() or 1) // num_cards))
        self.base = share_base(task.config, Path(task.model_folder), Path(task.train_file), Path(task.heldout_file))
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def call(self, name: str, *arguments: Any) -> Any:
        """Ask the base."""
        return getattr(self.base, name)(*arguments)


class RemoteBase:
    """A base in an actor, as `train.beside.Base`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def join(self, trial_id: str, config: ChatbotConfig, checkpoint: Path | None = None) -> dict[str, float]:
        """Add an adapter; return its position."""
        found: dict[str, float] = self._ask("join", trial_id, config, checkpoint)
        return found

    def advance(self, trial_id: str, num_steps: int) -> dict[str, float]:
        """Take steps."""
        found: dict[str, float] = self._ask("advance", trial_id, num_steps)
        return found

    def evaluate(self, trial_id: str) -> float:
        """Return the held-out loss."""
        found: float = self._ask("evaluate", trial_id)
        return found

    def save(self, trial_id: str, folder: Path) -> None:
        """Write a checkpoint."""
        self._ask("save", trial_id, folder)

    def leave(self, trial_id: str) -> None:
        """Take the adapter away."""
        self._ask("leave", trial_id)

    def _ask(self, name: str, *arguments: Any) -> Any:
        return ray.get(self.actor.call.remote(name, *arguments))


@dataclass(frozen=True)
class TrainBeside:
    """Trains one trial on the base of the card that it is on."""

    bases: dict[str, Any]
    """Actors, by the id of their node."""

    def __call__(self, task: Task, host: Host, checkpoint: Any = None) -> None:
        """As `train.worker.train_adapter`."""
        from train.beside import train_beside

        train_beside(RemoteBase(self.bases[ray.get_runtime_context().get_node_id()]), task, host, checkpoint)


def start_bases(task: Task, num_cards: int, num_trials: int, on_gpu: bool) -> TrainBeside:
    """Load a base on each train card, for so many trials there; they end with this process.

    Raises:
        ModelError: The base cannot be shared.
    """
    actor = ray.remote(BaseActor).options(
        num_cpus=0,
        num_gpus=1 if on_gpu else 0,
        resources={"card": BASES_SHARE},
        label_selector=card_selector(),
        max_concurrency=2 * num_trials + 2,
    )
    actors = [actor.remote() for _ in range(num_cards)]
    return TrainBeside(dict(zip(ray.get([actor.load.remote(task, num_cards) for actor in actors]), actors, strict=True)))
