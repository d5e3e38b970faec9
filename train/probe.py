"""Some steps of real training, with made-up weights and rows: how fast a card is, and how much of its memory they take.

Knows how `train.worker` puts a step together. Does not know where configs come from, or what the figures are for.
`python -m train.probe` reads {"config": ..., "model": the model's config.json} on standard input, and prints the figures as JSON.
"""

import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from cluster.home import BYTES_PER_GIB
from configs.schema import ChatbotConfig
from data.template import NO_LOSS
from train.attention import ATTENTION, CAUSAL
from train.fp8 import require_fp8
from train.model import (
    add_adapter,
    blocks,
    finish_base,
    is_compiled,
    let_segments_grow,
    pick_attention,
    pick_dtype,
    pick_graphs,
    suit_attention,
)
from train.reporting import peak_memory_gib, taken_memory_gib, wait_for_gpu
from train.rows import Packer, Padder, Row, RowOrder
from train.step import OrderedTrainer, training_arguments

NUM_WARMUP_STEPS, NUM_STEPS = 5, 4
SPREAD = 0.02  # of made-up weights, as models are usually begun with


@dataclass(frozen=True)
class Figures:
    """What some steps took."""

    tokens_per_s: float
    taken_gib: float
    """As the plan means it: see `train.reporting.taken_memory_gib`."""
    held_gib: float
    """Most that torch's allocator held; resident memory without a GPU."""
    tensors_gib: float
    """Most that lay in tensors at once; resident memory without a GPU."""
    loss: float
    """Mean of all steps, the first ones too: rows and adapter begin alike, so that another one says that something else was computed."""
    gradient_norm: float
    """Of the last step."""
    context_gib: float
    """What the driver counts as used beyond what torch's allocator holds; other processes' too, where there are any."""


def make_base(model: dict[str, Any], config: ChatbotConfig, longest_tokens: int) -> Any:
    """Make a frozen base as `train.model.load_base` would load it, but of random weights, layer by layer on the device.

    Args:
        model: The model's config.json.
        config: Says how the base is quantised, and in which format it is.
        longest_tokens: Length of the longest row.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.train.precision == "fp8":
        require_fp8()
    let_segments_grow()
    _forget()
    settings = {name: value for name, value in model.items() if name not in ("architectures", "model_type", "quantization_config")}
    made = AutoConfig.for_model(model["model_type"], **settings)
    dtype, attention = pick_dtype(config.model), pick_attention(config.train, longest_tokens)
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head, quantises = base.get_output_embeddings(), config.train.quantization == "nf4"
    small = {name for name, layer in base.named_modules() if quantises and isinstance(layer, torch.nn.Linear) and layer is not head}
    # Each weight of its own would leave a hole among those in 4 bit, as no real load does.
    scratch = torch.empty(max((base.get_submodule(name).weight.numel() for name in small), default=0), dtype=dtype, device=device)
    for name, layer in list(base.named_modules()):
        for key, weight in layer.named_parameters(recurse=False):
            passes = name in small and key == "weight"
            value = scratch[: weight.numel()].view(weight.shape) if passes else torch.empty(weight.shape, dtype=dtype, device=device)
            value = value.normal_(0, SPREAD) if weight.dim() > 1 else value.fill_(key == "weight")
            setattr(layer, key, torch.nn.Parameter(value, requires_grad=False))
        if name in small:
            base.set_submodule(name, _quantise(layer, config.train.double_quantization))
    del scratch
    base.tie_weights()
    base.to(device)  # what is no weight, such as the rotation's frequencies
    base.is_loaded_in_4bit = config.train.quantization == "nf4"
    base.config.use_cache = False
    finish_base(base, config.train)
    return base


def _quantise(layer: Any, double: bool) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"compress_statistics": double, "quant_type": "nf4"}
    dtype, device = layer.weight.dtype, layer.weight.device
    small = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, device="meta", **settings)
    small.weight = Params4bit(layer.weight.data, requires_grad=False, **settings).to(device)
    small.bias = layer.bias
    return small


def make_rows(lengths: Sequence[int], num_rows: int, vocabulary: int) -> list[Row]:
    """Make rows of these lengths in turn, of random tokens that all carry loss but the first."""
    chance = random.Random(0)  # noqa: S311 (no secret)
    rows = []
    for number in range(num_rows):
        tokens = [chance.randrange(vocabulary) for _ in range(lengths[number % len(lengths)])]
        rows.append({"input_ids": tokens, "labels": [NO_LOSS, *tokens[1:]]})
    return rows


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds and tokens of the steps after the warm-up."""

    began_s = took_s = 0.0
    tokens_before = num_tokens = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_gpu(state.global_step in (NUM_WARMUP_STEPS, state.max_steps))
        if state.global_step <= NUM_WARMUP_STEPS:
            self.began_s, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen
        self.took_s, self.num_tokens = time.perf_counter() - self.began_s, state.num_input_tokens_seen - self.tokens_before


def run_steps(base: Any, config: ChatbotConfig, rows: list[Row], num_steps: int = NUM_STEPS) -> Figures:
    """Train so many steps after a warm-up, evaluate a batch, and leave the base as it was; the config's size is settled."""
    train = config.train.model_copy(
        update={"max_steps": NUM_WARMUP_STEPS + num_steps, "eval_every_steps": None, "early_stopping_patience": None}
    )
    config, clock = config.model_copy(update={"train": train}), _Clock()
    _forget()
    set_seed(train.seed)
    try:
        longest_tokens = max(len(row["input_ids"]) for row in rows)
        suit_attention(base, train.packing, longest_tokens)
        model = add_adapter(base, train.lora, train.gradient_checkpointing is True, train.label_smoothing, is_compiled(train))
        with tempfile.TemporaryDirectory(prefix="tandem-probe-") as scratch:
            arguments = training_arguments(config, Path(scratch), 1, len(rows), longest_tokens, base.dtype == torch.bfloat16)
            arguments.save_strategy, arguments.logging_steps = "no", train.max_steps  # a number asked of the GPU in the midst costs time
            order = RowOrder(rows, train.batch_size, train.seed, by_length=not train.packing)
            settings = {"args": arguments, "train_dataset": rows, "eval_dataset": rows, "callbacks": [clock]}
            settings |= {"data_collator": Packer() if train.packing else Padder(0), "cuda_graphs": pick_graphs(base, train, 1)}
            trainer = OrderedTrainer(order, model=model, **settings)
            loss = trainer.train().training_loss
            gradient_norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
            trainer.evaluate(rows[: arguments.per_device_eval_batch_size])  # as a run does, in batches of its own size
        held_gib = torch.cuda.max_memory_reserved() / BYTES_PER_GIB if torch.cuda.is_available() else peak_memory_gib()
        return Figures(
            clock.num_tokens / clock.took_s, taken_memory_gib(), held_gib, peak_memory_gib(), loss, gradient_norm, _context_gib()
        )
    finally:
        _take_off(base)


def _take_off(base: Any) -> None:
    """Take adapter, shortcut, hooks, compiled code and attention of packed rows off a base."""
    from peft.tuners.lora import LoraLayer

    for block in blocks(base):
        block._compiled_call_impl = None
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer):
            base.set_submodule(name, layer.get_base_layer())
    base.__dict__.pop("forward", None)
    if base.config._attn_implementation in (ATTENTION, CAUSAL):
        base.set_attn_implementation("sdpa")
    # PEFT asks for their gradients too, and transformers then forgets the first hook.
    base.get_input_embeddings()._forward_hooks.clear()
    base.gradient_checkpointing_disable()


def _forget() -> None:
    """Give back what earlier steps held, and count the peak anew."""
    gc.collect()  # a Trainer refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _context_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return float(total_bytes - free_bytes - torch.cuda.memory_reserved()) / BYTES_PER_GIB


def main() -> None:
    """Probe what standard input says, with rows as long as the config lets them be."""
    asked = json.loads(sys.stdin.read())
    config = ChatbotConfig.model_validate(asked["config"])
    longest_tokens = config.data.max_length_tokens
    base = make_base(asked["model"], config, longest_tokens)
    lengths = (longest_tokens, longest_tokens - 1)  # as in training, where rows are filled up
    rows = make_rows(lengths, config.train.batch_size * (NUM_WARMUP_STEPS + NUM_STEPS), asked["model"]["vocab_size"])
    print(json.dumps(asdict(run_steps(base, config, rows))))


if __name__ == "__main__":
    main()
