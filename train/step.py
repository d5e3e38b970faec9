"""The step: transformers' Trainer, with an order of rows that a resumed run finds again.

Knows transformers' Trainer. Does not know Ray.
"""

from typing import Any

from transformers import Trainer, TrainerCallback

from train.rows import RowOrder


class OrderedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, taking rows in the given order."""

    def __init__(self, order: RowOrder, **settings: Any) -> None:
        super().__init__(**settings)
        self.order = order
        self.add_callback(_KeepEpoch(order))

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order


class _KeepEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the order its epoch: accelerate's set_epoch does not reach it after a resume with several workers (two wrappers deep)."""

    def __init__(self, order: RowOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.order.set_epoch(int(state.epoch or 0))
