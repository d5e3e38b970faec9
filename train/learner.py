"""One adapter's own part in training: its rows' order, optimizer, schedule and position, and the checkpoint that holds them.

Knows transformers' settings and file names, so that a checkpoint goes on in `train.step.OrderedTrainer` and the other way round.
Does not know the base, or which other adapters share it.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, get_scheduler
from transformers.trainer_pt_utils import get_length_grouped_indices

from configs.schema import ChatbotConfig
from data.template import NO_LOSS
from train.rows import Row, RowOrder
from train.step import take_rate, training_arguments

OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"


class Learner:
    """The steps of one adapter, as transformers' Trainer takes them."""

    def __init__(self, config: ChatbotConfig, rows: list[Row], heldout: list[Row], autocast: bool) -> None:
        longest_tokens = max(len(row["input_ids"]) for row in rows + heldout)
        self.arguments = training_arguments(config, Path(), 1, len(rows), longest_tokens, autocast)
        self.config, self.rows, self.heldout = config, rows, heldout
        train = config.train
        self.order = RowOrder(rows, train.batch_size, train.seed, by_length=not train.packing)
        self.rows_a_step = self.arguments.per_device_train_batch_size * self.arguments.gradient_accumulation_steps
        self.steps_an_epoch = math.ceil(len(rows) / self.rows_a_step)
        num_steps = train.count_steps(len(rows))
        self.state = TrainerState(
            max_steps=num_steps,
            num_train_epochs=math.ceil(num_steps / self.steps_an_epoch),
            train_batch_size=self.arguments.per_device_train_batch_size,
            stateful_callbacks=[TrainerControl()],  # a Trainer that goes on from here looks for it
        )
        self.state.compute_steps(self.arguments, num_steps)
        self.losses: list[float] = []  # since the last one that was logged
        self.parameters: list[torch.nn.Parameter] = []
        self._epoch: tuple[int, list[int]] | None = None

    def begin(self, matrices: Iterable[torch.Tensor]) -> None:
        """Make optimizer and schedule for an adapter's matrices: by layer, (rank, inputs) and then (rank, outputs)."""
        self.parameters = [torch.nn.Parameter(matrix) for matrix in matrices]
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        # The second group is what a Trainer leaves without decay; an adapter has no such weights.
        groups = [{"params": self.parameters, "weight_decay": self.arguments.weight_decay}, {"params": [], "weight_decay": 0.0}]
        self.optimizer = kind(groups, **settings)
        self.scheduler = get_scheduler(
            self.arguments.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.arguments.get_warmup_steps(self.num_steps),
            num_training_steps=self.num_steps,
        )

    @property
    def step(self) -> int:
        """How many steps are taken."""
        return int(self.state.global_step)

    @property
    def num_steps(self) -> int:
        """How many steps there are."""
        return int(self.state.max_steps)

    @property
    def num_tokens(self) -> int:
        """How many tokens went by."""
        return int(self.state.num_input_tokens_seen)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.num_steps

    def next_rows(self) -> list[Row]:
        """Return the rows of the step to take now."""
        epoch, place = divmod(self.step, self.steps_an_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self.order.set_epoch(epoch)
            self._epoch = epoch, list(self.order)
        places = self._epoch[1][place * self.rows_a_step : (place + 1) * self.rows_a_step]
        return [self.rows[place] for place in places]

    def next_micro_batches(self) -> list[list[Row]]:
        """Return the rows of the step to take now, in the parts that are computed at once when it trains alone."""
        rows, size = self.next_rows(), self.arguments.per_device_train_batch_size
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    def heldout_batches(self) -> list[list[Row]]:
        """Return the held-out rows in the batches over which a Trainer takes the mean."""
        size = self.arguments.per_device_eval_batch_size
        places = list(range(len(self.heldout)))
        if not self.config.train.packing:
            chance = torch.Generator().manual_seed(self.arguments.seed)
            places = get_length_grouped_indices([len(row["input_ids"]) for row in self.heldout], size, generator=chance)
        return [[self.heldout[place] for place in places[begin : begin + size]] for begin in range(0, len(places), size)]

    def update(self, gradients: Iterable[torch.Tensor]) -> None:
        """Take a step along the gradients, in the order of the matrices."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.num_input_tokens_seen += sum(len(row["input_ids"]) for row in self.next_rows())
        self.state.global_step += 1
        self.state.epoch = self.step / self.steps_an_epoch

    def record(self, loss: float) -> None:
        """Note the loss of the step that was taken; every so many of them become one entry of the history."""
        self.losses.append(loss)
        if self.step % self.config.train.log_every_steps == 0:
            self.log(loss=sum(self.losses) / len(self.losses))
            self.losses.clear()

    def log(self, **found: float) -> None:
        """Add an entry to the history, which is part of a checkpoint."""
        self.state.log_history.append({**found, "step": self.step, "epoch": self.state.epoch, "num_input_tokens_seen": self.num_tokens})

    def save(self, folder: Path) -> None:
        """Write optimizer, schedule and position beside the adapter."""
        state = self.optimizer.state_dict()
        torch.save({**state, "state": _turned(state["state"])}, folder / OPTIMIZER)
        torch.save(self.scheduler.state_dict(), folder / SCHEDULER)
        self.state.save_to_json(str(folder / STATE))

    def restore(self, folder: Path) -> None:
        """Go on where a checkpoint ends."""
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict({**state, "state": _turned(state["state"])})
        self.scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        self.state = TrainerState.load_from_json(str(folder / STATE))
        take_rate(self.config.train.learning_rate, self.optimizer, self.scheduler)


def num_targets(rows: Iterable[Row]) -> int:
    """Count the tokens that carry loss: all but a row's first, which nothing predicts."""
    return sum(label != NO_LOSS for row in rows for label in row["labels"][1:])


def _turned(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Turn what belongs to every second matrix: PEFT has it as (outputs, rank), and we as (rank, outputs)."""
    return {
        place: {key: value.T.contiguous() if place % 2 and value.dim() == 2 else value for key, value in entry.items()}
        for place, entry in state.items()
    }
