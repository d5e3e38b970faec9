"""The step: transformers' Trainer, with an order of rows that a resumed run finds again.

Knows transformers' Trainer. Does not know Ray.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from cluster.memory import EVALUATION_TOKENS, GRAPH_ANSWER_PARTS
from configs.schema import ChatbotConfig
from train.graphs import MicroSteps
from train.rows import Row, RowOrder, answer_places, few_lengths, fill_up, fill_up_packed
from train.unpacked import scratches_of

NUM_TOKENS = "num_tokens"

Batch = dict[str, Any]


class OrderedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, taking rows in the given order, and keeping a GPU busy from one step to the next.

    A GPU runs behind the process that tells it what to do, and stands still where that one waits for it or is slow. So nothing of a step
    asks the GPU for a number, or waits until it has a batch, and nothing walks over the frozen weights, of which a large base has
    thousands. Several workers still do: they count their tokens together, and wrap the model in torch's own.

    Args:
        order: Of the rows.
        data_collator: Makes a batch of them.
        cuda_graphs: Whether steps may be CUDA graphs; as long as they are or may be, batches are filled up, so that there are few shapes.
    """

    def __init__(
        self, order: RowOrder, data_collator: Callable[[Sequence[Row]], Batch], cuda_graphs: Literal["auto"] | bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.order = order
        self.add_callback(_KeepEpoch(order))
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.micro_steps = MicroSteps(self._micro_step, self.trained, scratches_of(self.model), cuda_graphs)
        self.data_collator = _Counted(data_collator, self.micro_steps, few_lengths(max(order.lengths)))
        self.model.train()  # once through all of it
        self.model.train = MethodType(_train, self.model)
        self.model.zero_grad = lambda *_, **__: self.micro_steps.zero_gradients()

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add a batch's gradients; the model is that of this trainer, which has one worker where steps may be graphs."""
        if num_items_in_batch is None or not self.micro_steps.may_be:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        inputs = {name: value for name, value in self._prepare_inputs(inputs).items() if name != NUM_TOKENS}
        if rows := inputs.pop("rows", None):  # a graph reads its tensor where it was captured
            inputs |= {"places": rows.places, "spread": replace(rows, places=None)}
        return self.micro_steps.step(inputs, torch.as_tensor(num_items_in_batch, device=self.args.device))

    def _micro_step(self, inputs: Batch, num_items: torch.Tensor) -> torch.Tensor:
        if "spread" in inputs:
            inputs = {**inputs, "rows": replace(inputs["spread"], places=inputs["places"])}
            del inputs["spread"], inputs["places"]
        loss: torch.Tensor = super().training_step(self.model, inputs, num_items)
        return loss

    def evaluate(self, *arguments: Any, **settings: Any) -> Any:
        """Evaluate in memory that is there without the graphs."""
        self.micro_steps.drop()
        return super().evaluate(*arguments, **settings)

    def compute_loss(self, model: Any, inputs: Batch, *arguments: Any, **settings: Any) -> Any:
        """Leave the count out of what the model gets."""
        inputs = {name: value for name, value in inputs.items() if name != NUM_TOKENS}
        return super().compute_loss(model, inputs, *arguments, **settings)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Count none: nobody reads them."""
        return 0

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        num_tokens = inputs[NUM_TOKENS]
        if self.args.world_size > 1:
            num_tokens = int(self.accelerator.gather(torch.tensor(num_tokens, device=self.args.device)).sum())
        self.state.num_input_tokens_seen += num_tokens

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)


def _train(self: Any, mode: bool = True) -> Any:
    """Put a model into training or out of it, where it is not there already: asked for at each step, as a whole."""
    return self if self.training == mode else type(self).train(self, mode)


@dataclass(frozen=True)
class _Counted:
    """Makes batches that say how many tokens they hold and where answers are, before they are on a GPU."""

    collate: Callable[[Sequence[Row]], Batch]
    micro_steps: MicroSteps
    lengths: Sequence[int]
    """That rows may have where shapes are to be few; a longer one stays as it is."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch, num_parts = self.collate(rows), None
        if self.micro_steps.may_be:
            filled = fill_up_packed(batch, self.lengths[-1]) if "rows" in batch else fill_up(batch, self.lengths)
            batch, num_parts = filled, GRAPH_ANSWER_PARTS
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        return {**batch, "answers": answer_places(batch["labels"], num_parts), NUM_TOKENS: num_tokens}


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
        optim="adamw_bnb_8bit" if train.optimizer_bits == 8 else "adamw_torch_fused",
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
        logging_nan_inf_filter=False,  # a loss that is no number is shown, and not looked for at each step
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="random" if train.packing else "group_by_length",  # in evaluation; for training, see RowOrder
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
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
