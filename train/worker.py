"""What runs on a train card: load, train, report; called by Ray Train, or straight by a sweep's trial.

Knows transformers' Trainer. Does not know how its card was found or what becomes of the adapter: its host does.

transformers' Trainer does the step. TRL's SFTTrainer on top of it was measured at 0.6 of its speed on this work (entropy and accuracy of
every token), and its switch for loss on the answers alone refuses templates without marks.
"""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ModelError, TandemError
from configs.schema import ChatbotConfig, TrainConfig
from train.control import find_control
from train.host import Host, TrainHost

EVAL_TOKENS = 2048  # an evaluation batch; micro-batches of a few short rows leave a processor idle


@dataclass(frozen=True)
class Task:
    """All that a worker needs to know; plain values, so that Ray can send it."""

    config: ChatbotConfig
    run_id: str
    model_folder: str
    train_file: str
    heldout_file: str
    mlflow_url: str


def train_worker(task: Task) -> None:
    """Train one adapter as a worker of Ray Train."""
    import ray
    from ray import train as ray_train

    context = ray_train.get_context()
    control = find_control(task.run_id)
    host = TrainHost(control, context.get_world_size(), context.get_world_rank() == 0)
    try:
        train_adapter(task, host, ray_train.get_checkpoint())
    except TandemError as error:
        # Told, not raised: Ray would begin anew `max_failures` times, to the same end.
        ray.get(control.refuse.remote(error))


def train_adapter(task: Task, host: Host, checkpoint: Any = None) -> None:
    """Train one adapter, from Ray's checkpoint if there is one; report metrics and checkpoints to the host, curves to MLflow.

    Raises:
        TandemError: What the user can mend.
    """
    if host.num_workers == 1:
        # With these set, accelerate would wrap a lone worker for data-parallel training.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="tandem-train-") as scratch:
        trainer = _make_trainer(task, Path(scratch), host)
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=folder)
        else:
            trainer.train()


def count_steps(train: TrainConfig, num_rows: int) -> int:
    """Return how many steps a run over so many rows has."""
    return train.max_steps or max(1, math.ceil(math.ceil(num_rows / train.batch_size) * train.num_epochs))


def _make_trainer(task: Task, scratch: Path, host: Host) -> Any:
    import torch
    from transformers import set_seed

    from data.template import load_tokenizer
    from train.model import add_adapter, load_base, packs_safely
    from train.reporting import ReportCallback
    from train.rows import Packer, Padder, RowOrder, read_rows
    from train.step import OrderedTrainer

    train = task.config.train
    set_seed(train.seed)
    tokenizer = load_tokenizer(Path(task.model_folder))
    rows = read_rows(Path(task.train_file), tokenizer, task.config.data)
    heldout = read_rows(Path(task.heldout_file), tokenizer, task.config.data)
    longest_tokens = max(len(row["input_ids"]) for row in rows + heldout)
    base = load_base(Path(task.model_folder), task.config.model, train, longest_tokens)
    if train.packing and not packs_safely(base):
        raise ModelError(
            "train.packing does not suit this model", "its layers would let packed conversations see each other", "train.packing=false"
        )
    model = add_adapter(base, train.lora, train.gradient_checkpointing, train.label_smoothing)
    arguments = _arguments(task.config, scratch, host.num_workers, len(rows), longest_tokens, base.dtype == torch.bfloat16)
    return OrderedTrainer(
        RowOrder(rows, train.batch_size, train.seed, by_length=not train.packing),
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=heldout,
        data_collator=Packer() if train.packing else Padder(tokenizer.pad_token_id or tokenizer.eos_token_id),
        callbacks=[ReportCallback(task, host)],
    )


def _arguments(config: ChatbotConfig, scratch: Path, num_workers: int, num_rows: int, longest_tokens: int, autocast: bool) -> Any:
    """Translate our settings into transformers' own."""
    import torch
    from transformers import TrainingArguments

    train = config.train
    on_gpu = torch.cuda.is_available()
    per_worker = train.batch_size // num_workers
    micro_batch = train.micro_batch_size or per_worker
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=max(micro_batch, EVAL_TOKENS // longest_tokens),
        gradient_accumulation_steps=per_worker // micro_batch,
        learning_rate=train.learning_rate,
        # transformers' own "constant" leaves out the warm-up.
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=round(count_steps(train, num_rows) * train.warmup_share),
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
