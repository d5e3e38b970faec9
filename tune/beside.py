"""Trials that share a card: an actor holds one base there, and the trials, light processes beside it, ask it for steps.

Knows Ray's actors and how a card is divided. Does not know the step, or who goes on.
"""

import math
import threading
import time
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import ray

from cluster.placement import CARD, GPU_SHARE, card_selector, num_threads
from configs.errors import ModelError, RunError
from configs.loader import with_settings
from configs.schema import ChatbotConfig
from data.prepare import Prepared
from train.host import Host
from train.memory import MAX_BATCH_TOKENS, Memory, outline
from train.worker import Task, on_this_machine
from tune.seats import BASES_SHARE, Bases

NUM_TRIALS = 4
MAX_TOKENS = 2048  # of a step: at 1,500, four share an H100 at three times the pace of one after another; at 6,000 one fills it by itself
MAX_LOADS = 3  # of a base that dies while it loads, before the trials that wait for it fail
BASE_WAIT_S = 1800.0  # of a trial for its base: a large one is loaded in less, and another sweep may have taken the card of one that died
OF_THE_BASE = ("train.quantization", "train.double_quantization", "train.precision", "train.num_workers", "train.compile")
NEEDS_ITS_OWN = {"train.lora.dropout": 0, "train.optimizer_bits": 32}  # beside this value


@dataclass(frozen=True)
class Sharing:
    """How many trials are on a card at once, and how they go through their base."""

    num_trials: int = 1
    recompute: bool = False
    """Whether activations are recomputed."""
    max_batch_tokens: int = MAX_BATCH_TOKENS
    """Most tokens of all of them in one pass."""


def choose_sharing(config: ChatbotConfig, data: Prepared, model_folder: Path, on_gpu: bool) -> Sharing:
    """Return as many trials a card as the config says; or several where that is quicker and memory surely reaches.

    Raises:
        RunError: The config wants what cannot be.
    """
    reason, recompute = why_not(config), config.train.gradient_checkpointing is True
    wanted = config.tune.trials_per_card
    if wanted and wanted > 1 and reason:
        raise RunError(f"tune.trials_per_card={wanted} cannot be", reason, "tune.trials_per_card=1")
    if wanted:
        return Sharing(wanted, recompute)
    tokens_a_row = data.num_train_tokens / data.num_train
    if reason or not on_gpu or _largest(config, "train.batch_size") * tokens_a_row > MAX_TOKENS:
        return Sharing()
    num_rows = NUM_TRIALS * min(_largest(config, "train.micro_batch_size"), _largest(config, "train.batch_size"))
    return _within_memory(config, num_rows * tokens_a_row, model_folder)


def _within_memory(config: ChatbotConfig, num_tokens: float, model_folder: Path) -> Sharing:
    """Let trials share where a pass of so many tokens stays within what `train.memory` allows, recomputed if it must be; else not."""
    from train.group import why_no_group

    try:
        base = outline(model_folder)
    except ModelError:  # each trial will say so
        return Sharing()
    if why_no_group(base):
        return Sharing()
    rank, quantization = int(_largest(config, "train.lora.rank")), config.train.quantization
    for recompute in sorted({config.train.gradient_checkpointing is True, True}):
        most_tokens = Memory(base, NUM_TRIALS, rank, quantization, recompute).most_tokens
        if most_tokens >= num_tokens:
            return Sharing(NUM_TRIALS, recompute, min(most_tokens, MAX_BATCH_TOKENS))
    return Sharing()


def _largest(config: ChatbotConfig, path: str) -> float:
    """Return the largest value of a setting that any trial may have; an empty one, or `auto`, has no bound."""
    dimension = config.tune.space.get(path)
    drawn = dimension and (dimension.choice or dimension.integer or dimension.uniform or dimension.log)
    return max(value if isinstance(value, int | float) else math.inf for value in drawn or [attrgetter(path)(config)])


def why_not(config: ChatbotConfig) -> str | None:
    """Tell why this sweep's trials cannot share a base, as far as the config says; the base itself may refuse too."""
    from train.group import why_apart

    for path, dimension in config.tune.space.items():
        if path in OF_THE_BASE or not path.startswith("train."):
            return f"{path} differs between trials, and a base has one"
        if path in NEEDS_ITS_OWN and dimension.choice != [NEEDS_ITS_OWN[path]]:
            return f"{path} needs a base of its own"
    return why_apart(config)


class BaseActor:
    """One base on one card: `train.shared.SharedBase` in a process of its own, which Ray starts again if it dies."""

    def __init__(self, task: Task, max_batch_tokens: int, num_cards: int) -> None:
        self.task, self.max_batch_tokens, self.num_cards = task, max_batch_tokens, num_cards
        self.base: Any = None
        self.loading = threading.Lock()

    def card(self) -> str:
        """Return the card that it is on, which may be another one after it died."""
        return str(ray.get_runtime_context().get_node_labels()[CARD])

    def load(self) -> str:
        """Load the base if it is not there; return its card."""
        import torch

        from train.shared import share_base

        with self.loading:
            if self.base is None:
                if not torch.cuda.is_available():
                    torch.set_num_threads(num_threads(ray.get_runtime_context().get_node_labels(), self.num_cards))
                task = on_this_machine(self.task)
                folder, train_file, heldout_file = map(Path, (task.model_folder, task.train_file, task.heldout_file))
                self.base = share_base(self.task.config, folder, train_file, heldout_file, self.max_batch_tokens)
        return self.card()

    def call(self, name: str, *arguments: Any) -> Any:
        """Ask the base."""
        if self.base is None:
            raise RuntimeError("the base was started anew, and knows no trial")
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
        # Not asked again of a base that was started anew: it knows no trial.
        return ray.get(self.actor.call.options(max_task_retries=0).remote(name, *arguments))


@dataclass(frozen=True)
class TrainBeside:
    """Trains one trial on the base of the card that it is on."""

    bases: tuple[Any, ...]
    """Actors."""

    def __call__(self, task: Task, host: Host, checkpoint: Any = None) -> None:
        """As `train.worker.train_adapter`."""
        from train.beside import train_beside

        train_beside(RemoteBase(self._base_here()), task, host, checkpoint)

    def _base_here(self) -> Any:
        """Return the base on this card, loaded; each is asked where it is now, since it and its raylet may have been killed.

        A trial that waits keeps its part of the card, so it does not wait for ever.
        """
        here, until_s = ray.get_runtime_context().get_node_labels()[CARD], time.monotonic() + BASE_WAIT_S
        asked = {base.card.remote(): base for base in self.bases}
        while asked:
            told, _ = ray.wait(list(asked), timeout=max(0.0, until_s - time.monotonic()))
            if not told:
                break
            base = asked.pop(told[0])
            if ray.get(told[0]) == here:
                ray.get(base.load.remote(), timeout=max(0.0, until_s - time.monotonic()))
                return base
        raise RuntimeError(f"{here} has no base any more")


def start_bases(task: Task, sharing: Sharing, num_cards: int, on_gpu: bool) -> Bases:
    """Load a base on each train card, and wait for the first; they end with this process.

    Raises:
        ModelError: The base cannot be shared.
    """
    task = replace(task, config=with_settings(task.config, {"train.gradient_checkpointing": sharing.recompute}))
    actor = ray.remote(BaseActor).options(
        num_cpus=0,
        num_gpus=GPU_SHARE if on_gpu else 0,
        resources={CARD: BASES_SHARE},
        label_selector=card_selector(),
        max_concurrency=2 * sharing.num_trials + 2,
        max_restarts=-1,  # it is the trials' failures that are counted
        max_task_retries=MAX_LOADS,
    )
    bases = Bases([actor.remote(task, sharing.max_batch_tokens, num_cards) for _ in range(num_cards)])
    bases.cards()
    return bases
