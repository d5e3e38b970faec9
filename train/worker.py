"""What runs on a train card: load, train, report; called by Ray Train, or straight by a sweep's trial.

Knows transformers' Trainer. Does not know how its card was found or what becomes of the adapter: its host does.

transformers' Trainer does the step. TRL's SFTTrainer on top of it was measured at 0.6 of its speed on this work (entropy and accuracy of
every token), and its switch for loss on the answers alone refuses templates without marks.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.logs import set_up
from cluster.models import ensure_model
from configs.errors import ModelError, TandemError
from configs.schema import ChatbotConfig
from data.copies import fetch_data
from train.control import find_control
from train.host import Host, TrainHost
from train.sizing import Sizing


@dataclass(frozen=True)
class Task:
    """All that a worker needs to know; plain values, so that Ray can send it."""

    config: ChatbotConfig
    run_id: str
    model_folder: str
    train_file: str
    heldout_file: str
    longest_tokens: int
    """Of a row of either."""
    mlflow_url: str
    sizing: Sizing | None = None
    """What the run's size was chosen by; None where the plan does not know the model."""
    storage: str = ""
    """Where its data lies for workers on other machines; empty where there are none."""


def train_worker(task: Task) -> None:
    """Train one adapter as a worker of Ray Train."""
    import ray
    from ray import train as ray_train

    set_up()
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
    import torch

    task = on_this_machine(task)
    if host.num_workers == 1:
        # With these set, accelerate would wrap a lone worker for data-parallel training.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    elif torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = "0"  # of the GPUs that it sees, which is its card's alone; Ray counts the workers of the machine
    with tempfile.TemporaryDirectory(prefix="tandem-train-") as scratch:
        trainer = _make_trainer(task, Path(scratch), host)
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=folder)
        else:
            trainer.train()


def on_this_machine(task: Task) -> Task:
    """Return the task with files of this machine: what lies on the driver's alone is fetched.

    Raises:
        TandemError: They cannot be had here.
    """
    folder, data = Path(task.model_folder), Path(task.train_file).parent
    if not folder.is_dir():
        folder = ensure_model(task.config.model)
    if not data.is_dir():
        data = fetch_data(task.storage, data.name)
    train_file, heldout_file = (str(data / Path(file).name) for file in (task.train_file, task.heldout_file))
    return replace(task, model_folder=str(folder), train_file=train_file, heldout_file=heldout_file)


def _make_trainer(task: Task, scratch: Path, host: Host) -> Any:
    import torch
    from transformers import set_seed

    from data.template import load_tokenizer
    from train.model import add_adapter, is_compiled, load_base, pick_graphs, suit_attention
    from train.reporting import ReportCallback
    from train.rows import Packer, Padder, RowOrder, read_rows
    from train.step import OrderedTrainer, training_arguments

    train = task.config.train
    set_seed(train.seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of an earlier trial of a sweep
    tokenizer = load_tokenizer(Path(task.model_folder))
    with ThreadPoolExecutor(1) as reader:  # while the base is loaded
        reading = reader.map(lambda file: read_rows(Path(file), tokenizer, task.config.data), (task.train_file, task.heldout_file))
        base = load_base(Path(task.model_folder), task.config.model, train, task.longest_tokens)
        rows, heldout = reading
    longest_tokens = max(len(row["input_ids"]) for row in rows + heldout)
    if not suit_attention(base, train.packing, longest_tokens):
        why = "its layers would let packed conversations see each other"
        raise ModelError("train.packing does not suit this model", why, "train.packing=false")
    model = add_adapter(base, train.lora, train.gradient_checkpointing is True, train.label_smoothing, is_compiled(train))
    arguments = training_arguments(task.config, scratch, host.num_workers, len(rows), longest_tokens, base.dtype == torch.bfloat16)
    return OrderedTrainer(
        RowOrder(rows, train.batch_size, train.seed, by_length=not train.packing),
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=heldout,
        data_collator=Packer() if train.packing else Padder(tokenizer.pad_token_id or tokenizer.eos_token_id),
        cuda_graphs=pick_graphs(base, train, host.num_workers),
        callbacks=[ReportCallback(task, host)],
    )
