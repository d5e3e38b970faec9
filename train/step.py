"""The step: transformers' Trainer, with an order of rows that a resumed run finds again.

Knows transformers' Trainer. Does not know Ray.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from cluster.memory import EVALUATION_TOKENS
from configs.schema import ChatbotConfig
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


def training_arguments(config: ChatbotConfig, scratch: Path, num_workers: int, num_rows: int, longest_tokens: int, autocast: bool) -> Any:
    """Translate our settings into transformers' own."""
    train = config.train
    on_gpu = torch.cuda.is_available()
    per_worker = train.batch_size // num_workers
    # Nobody chose where the plan does not know the model.
    micro_batch = per_worker if train.micro_batch_size == "auto" else train.micro_batch_size
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=max(micro_batch, EVALUATION_TOKENS // longest_tokens),
        gradient_accumulation_steps=per_worker // micro_batch,
        learning_rate=train.learning_rate,
        # transformers' own "constant" leaves out the warm-up.
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=round(train.count_steps(num_rows) * train.warmup_share),
        num_train_epochs=train.num_epochs,
        max_steps=train.max_steps or -1,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=autocast,
        use_cpu=not on_gpu,
        eval_strategy="steps" if train.eval_every_steps else "no",
        eval_steps=train.eval_every_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=train.checkpoint_every_steps,
        save_total_limit=1,
        logging_steps=train.log_every_steps,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="random" if train.packing else "group_by_length",  # in evaluation; for training, see RowOrder
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )


def take_rate(learning_rate: float, optimizer: Any, lr_scheduler: Any) -> None:
    """Put a learning rate in the place of a checkpoint's, which differs where a sweep changed it in the midst of a run."""
    if lr_scheduler is None or set(lr_scheduler.base_lrs) == {learning_rate}:
        return
    for group, before in zip(optimizer.param_groups, lr_scheduler.base_lrs, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] *= learning_rate / before
    lr_scheduler.base_lrs = [learning_rate] * len(lr_scheduler.base_lrs)
