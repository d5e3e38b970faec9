"""One base, many adapters: four that learn together on one card, against one after another by the same step, and by that of `train`.

Random weights in a known shape, made on the card; rows between half of the given length and all of it, loss on their second half.
`python tests/benchmarks/shared_base.py [--shapes 8b 135m | tiny] [--bases lora nf4] [--steps N] [--only 4x128] [--profile]`
"""

import argparse
import gc
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import VOCABULARY, random_model, write_result
from transformers import TrainerCallback

from cluster.home import BYTES_PER_GIB
from configs.cli import console
from configs.schema import ChatbotConfig
from data.template import NO_LOSS
from train.group import Group
from train.model import add_adapter, fuse_kernels
from train.rows import Padder, Row, RowOrder
from train.step import OrderedTrainer, training_arguments

NUM_ADAPTERS, RANK, NUM_WARMUP = 4, 16, 2
STEPS_A_TRIAL = 200  # what an adapter is counted as, in adapters an hour
# Rows a step, their longest, and whether activations are recomputed.
WORK = {
    "8b": [(4, 128, False), (4, 128, True), (4, 512, False), (4, 512, True), (8, 1024, True)],
    "135m": [(4, 128, False), (4, 512, False), (8, 1024, False)],
    "tiny": [(4, 32, False), (4, 32, True)],
}
PROFILED = {"8b": (4, 128, False), "135m": (4, 128, False), "tiny": (4, 32, False)}
ON_GPU = torch.cuda.is_available()


def make_base(shape: str, kind: str) -> Any:
    """Make a frozen base as `train.model.load_base` would load it."""
    base = random_model(shape).requires_grad_(False)
    base.config.use_cache = False
    if kind == "nf4":
        quantise(base)
    if ON_GPU:
        fuse_kernels(base)
    gc.collect()
    torch.cuda.empty_cache()
    return base


def quantise(base: Any) -> None:
    """Put 4-bit layers in the place of all linear ones but the head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(base.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not base.get_output_embeddings():
            settings = {"compress_statistics": True, "quant_type": "nf4"}
            small = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings)
            small.weight = Params4bit(layer.weight.data, requires_grad=False, **settings).to(layer.weight.device)
            base.set_submodule(name, small)
    base.is_loaded_in_4bit = True


def make_rows(longest: int) -> list[Row]:
    chance = random.Random(0)
    rows = []
    for _ in range(256):
        tokens = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(longest // 2, longest))]
        middle = len(tokens) // 2
        rows.append({"input_ids": tokens, "labels": [NO_LOSS] * middle + tokens[middle:]})
    return rows


def make_config(batch_size: int, seed: int) -> ChatbotConfig:
    lora = {"rank": RANK, "alpha": 2 * RANK}
    train = {"batch_size": batch_size, "max_steps": 1000, "seed": seed, "learning_rate": 1e-4 * (seed + 1), "lora": lora}
    return ChatbotConfig.model_validate({"name": "bench", "data": {"source": "x"}, "train": train | {"checkpoint_every_steps": 1000}})


class Clock(TrainerCallback):
    """Seconds of the steps after the warm-up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == NUM_WARMUP:
            self.began_s = now_s()
        self.steps_s = now_s() - self.began_s if state.global_step > NUM_WARMUP else 0.0


def now_s() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Bench:
    """One piece of work on a base, which is left as it was."""

    base: Any
    rows: list[Row]
    batch_size: int
    longest: int
    gradient_checkpointing: bool
    num_steps: int

    def plain(self) -> float:
        """Return the seconds of a step as `train` takes it."""
        config = make_config(self.batch_size, 0)
        model = add_adapter(self.base, config.train.lora, self.gradient_checkpointing)
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(config, Path(scratch), 1, len(self.rows), self.longest, autocast=True)
            arguments.max_steps, arguments.save_strategy = NUM_WARMUP + self.num_steps, "no"
            order = RowOrder(self.rows, self.batch_size, 0, by_length=True)
            settings = {"model": model, "args": arguments, "train_dataset": self.rows, "data_collator": Padder(2), "callbacks": [clock]}
            OrderedTrainer(order, **settings).train()
        model.unload()
        del self.base.__dict__["forward"]
        if self.gradient_checkpointing:
            self.base.disable_input_require_grads()
        self.base.gradient_checkpointing_disable()
        return clock.steps_s / self.num_steps

    def shared(self, num_adapters: int, profile: bool = False) -> tuple[float, float]:
        """Return the seconds of a step of so many adapters, and the peak of memory in bytes."""
        gc.collect()  # what went before refers to itself, and would count
        group = Group(self.base, self.rows, self.rows[:8], self.gradient_checkpointing)
        trials = [str(number) for number in range(num_adapters)]
        for number, trial in enumerate(trials):
            group.join(trial, make_config(self.batch_size, number))
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()

        def advance(num_steps: int) -> None:
            for _ in range(num_steps):
                group.step(trials)

        advance(NUM_WARMUP)
        began_s = now_s()
        advance(self.num_steps)
        step_s = (now_s() - began_s) / self.num_steps
        peak = float(torch.cuda.max_memory_allocated()) if ON_GPU else 0.0
        if profile:
            show_profile(lambda: group.step(trials))
        for trial in trials:
            group.leave(trial)
        group.model.unload()
        self.base.set_attn_implementation("sdpa")
        self.base.gradient_checkpointing_disable()
        return step_s, peak


def show_profile(step: Any) -> None:
    """Print which kernels a step spends its time in, and how much of it the GPU is busy."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        began_s = now_s()
        for _ in range(2):
            step()
        wall_s = (now_s() - began_s) / 2
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy_s = sum(event.self_device_time_total for event in kernels) / 2e6
    num_kernels = sum(event.count for event in kernels) // 2
    console.print(f"profiled step {wall_s:.3f} s, GPU busy {busy_s:.3f} s, {num_kernels} kernels (profiling itself slows the launches)")
    print(events.table(sort_by="self_cuda_time_total" if ON_GPU else "self_cpu_time_total", row_limit=15, max_name_column_width=70))


def measure(shape: str, kind: str, num_steps: int, profile: bool, only: str) -> dict[str, float]:
    """Measure all work of a base, each piece printed at once."""
    base = make_base(shape, kind)
    base_bytes = torch.cuda.memory_allocated() if ON_GPU else 0
    console.print(f"{shape} {kind}: base {base_bytes / BYTES_PER_GIB:.2f} GiB")
    figures: dict[str, float] = {f"sweep_{kind}_{shape}_base_gib": base_bytes / BYTES_PER_GIB}
    for work in WORK[shape]:
        batch_size, longest, gradient_checkpointing = work
        name = f"sweep_{kind}_{shape}_{batch_size}x{longest}{'_recomputed' if gradient_checkpointing else ''}"
        if only not in name:
            continue
        bench = Bench(base, make_rows(longest), *work, num_steps)
        plain_s = bench.plain()
        alone_s, alone_bytes = bench.shared(1)
        step_s, peak_bytes = bench.shared(NUM_ADAPTERS, profile and work == PROFILED[shape])
        found = {
            "plain_s": plain_s,
            "alone_s": alone_s,
            "together_s": step_s,
            "gain": NUM_ADAPTERS * alone_s / step_s,
            "gain_on_plain": NUM_ADAPTERS * plain_s / step_s,
            "adapters_per_hour": NUM_ADAPTERS * 3600 / (STEPS_A_TRIAL * step_s),
            "plain_adapters_per_hour": 3600 / (STEPS_A_TRIAL * plain_s),
        }
        if base_bytes:
            found |= {"memory_of_base": peak_bytes / base_bytes, "alone_memory_of_base": alone_bytes / base_bytes}
        console.print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=WORK, default=["135m", "8b"] if ON_GPU else ["tiny"])
    parser.add_argument("--bases", nargs="+", choices=["lora", "nf4"], default=["lora", "nf4"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="a part of the names of what is to be measured, such as 4x128")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for shape in arguments.shapes:
        for kind in arguments.bases if shape != "135m" else ["lora"]:
            figures |= measure(shape, kind, arguments.steps, arguments.profile, arguments.only)
            gc.collect()
            torch.cuda.empty_cache()
    notes = {"adapters": NUM_ADAPTERS, "rank": RANK, "steps_a_trial": STEPS_A_TRIAL, "rows": "half of the named length to all of it"}
    write_result("sweep-shared-base" if ON_GPU else f"sweep-shared-base-{'-'.join(arguments.shapes)}", figures, notes)


if __name__ == "__main__":
    main()
