"""Where a training step's time goes: kernels by kind, and what each part of the product brings, in one process on one base.

`PYTHONPATH=. python tests/benchmarks/step_profile.py [--shape 8b] [--kinds lora lora_fp8 qlora] [--ways ours ...]`
Random weights, rows of equal length, no Ray: `training.py` measures what a user gets. A way is a change to ours: `peft` leaves the
adapter's products to PEFT, `alone` multiplies each layer by itself, `unpacked` takes each out of 4 bit by itself, `cudnn` takes attention
from cuDNN, `flash` from torch's own, `compiled` is `train.compile`, `graphed` and `asked` are steps as CUDA graphs and without,
`hooked` recomputes in torch's newer way, `masked` leaves attention to transformers' masks. A way whose loss or gradient is another one
computes something else.
"""

import argparse
import gc
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bench import SHAPES, VOCABULARY, write_result
from memory import model_config
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import DeviceType, ProfilerActivity, profile, schedule
from transformers import PreTrainedModel

import train.fused
import train.model
from configs.cli import console
from configs.schema import ChatbotConfig
from train.probe import NUM_WARMUP_STEPS, make_base, make_rows, run_steps

NUM_STEPS = 8
WAYS = ["ours", "graphed", "asked", "peft", "alone", "unpacked", "cudnn", "flash", "compiled", "hooked", "masked"]
QLORA = {"quantization": "nf4", "batch_size": 1, "micro_batch_size": 1, "gradient_checkpointing": True}
KINDS = {
    "lora": (4096, {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False}),
    "lora_fp8": (4096, {"precision": "fp8", "batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False}),
    "lora_recomputed": (2048, {"batch_size": 1, "micro_batch_size": 1, "gradient_checkpointing": True}),
    "qlora": (2048, QLORA),
    "qlora_quantised_once": (2048, QLORA | {"double_quantization": False}),
    "qlora_4_rows": (2048, QLORA | {"batch_size": 4, "micro_batch_size": 4}),
}
"""Of each the length of its rows, in tokens, and what it sets."""
KERNELS = {
    "attention": r"flash|fmha|sdpa|attention",
    "unpacking": r"dequantize|kDequant",
    "product": r"gemm|cutlass|nvjet|xmma|cublas|_mm|splitK",
    "quantising": r"_quantise",
    "compiled": r"triton_(red|per|poi)",
    "optimizer": r"multi_tensor|adam|foreach",
    "norm_gate_rotation": r"rms_norm|rope|swiglu",
    "loss": r"softmax|nll|index",
    "copy_or_sum": r"elementwise|copy|reduce|Memcpy|Memset",
}


@contextmanager
def changed(way: str) -> Iterator[None]:
    """Do one thing in another way."""
    fuse_adapter, pack_by_block, siblings = train.model.fuse_adapter, train.model.pack_by_block, train.fused.SIBLINGS
    enable, without_masks = PreTrainedModel.gradient_checkpointing_enable, train.model.attend_without_masks
    if way == "peft":
        train.model.fuse_adapter = lambda model: None
    if way == "alone":
        train.fused.SIBLINGS = ()
    if way == "masked":
        train.model.attend_without_masks = lambda base, longest_tokens: False
    if way in ("peft", "unpacked"):
        train.model.pack_by_block = lambda blocks: None
    if way == "hooked":
        PreTrainedModel.gradient_checkpointing_enable = lambda base, settings: enable(base, settings | {"use_reentrant": False})
    if way in ("cudnn", "flash"):
        torch.backends.cuda.enable_flash_sdp(way == "flash")
        torch.backends.cuda.enable_cudnn_sdp(way == "cudnn")
    try:
        yield
    finally:
        train.model.fuse_adapter, train.model.pack_by_block, train.fused.SIBLINGS = fuse_adapter, pack_by_block, siblings
        PreTrainedModel.gradient_checkpointing_enable, train.model.attend_without_masks = enable, without_masks
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)


def profile_step(base: Any, config: ChatbotConfig, rows: list[Any]) -> dict[str, float]:
    """Return the milliseconds of one step's kernels by kind, how many there are, and how long the GPU had none."""
    when = schedule(wait=NUM_WARMUP_STEPS, warmup=1, active=1, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=when) as profiler:  # what the CPU does would be slower when recorded
        hook = register_optimizer_step_post_hook(lambda *_: profiler.step())
        try:
            run_steps(base, config, rows, 3)
        finally:
            hook.remove()
    kernels = [event for event in profiler.key_averages() if _is_kernel(event)]
    found: Counter[str] = Counter()
    for event in kernels:
        kind = next((kind for kind, name in KERNELS.items() if re.search(name, event.key, re.IGNORECASE)), "other")
        found[f"{kind}_ms"] += event.self_device_time_total / 1000
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
        console.print(f"  {event.self_device_time_total / 1000:8.2f} ms {event.count:6d} x {event.key[:110]}", highlight=False)
    idle_ms = _idle_ms([event.time_range for event in profiler.events() if _is_kernel(event)])
    return {**found, "kernels_ms": sum(found.values()), "num_kernels": sum(event.count for event in kernels), "idle_ms": idle_ms}


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.key.startswith(("ProfilerStep", "Optimizer."))


def _idle_ms(ranges: Sequence[Any]) -> float:
    """Return how long none of these ranges of microseconds was there, from the first to the last."""
    idle_us, end_us = 0.0, min((one.start for one in ranges), default=0.0)
    for one in sorted(ranges, key=lambda one: one.start):
        idle_us += max(0.0, one.start - end_us)
        end_us = max(end_us, one.end)
    return idle_us / 1000


def main() -> None:
    """Measure each kind in each way, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--length", type=int, help="of the rows, in tokens; if not given, that of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lora", "lora_fp8", "qlora"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ours"])
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for kind in arguments.kinds:
        length, settings = arguments.length or KINDS[kind][0], KINDS[kind][1]
        data, serve = {"source": "x", "max_length_tokens": length}, {"max_model_len_tokens": length}
        for way in arguments.ways:
            own = settings | {"compile": way == "compiled", "cuda_graphs": {"graphed": True, "asked": False}.get(way, "auto")}
            config = ChatbotConfig.model_validate({"name": "bench", "data": data, "train": own, "serve": serve})
            torch.manual_seed(0)
            base = make_base(model_config(arguments.shape), config, length)
            rows = make_rows((length,), config.train.batch_size * (NUM_WARMUP_STEPS + NUM_STEPS), VOCABULARY)
            with changed(way):
                found = run_steps(base, config, rows, NUM_STEPS)
                step_ms = config.train.batch_size * length / found.tokens_per_s * 1000
                name = f"{kind}_{arguments.shape}_{way}"
                values = {
                    "tokens_per_s": found.tokens_per_s,
                    "step_ms": step_ms,
                    "held_gib": found.held_gib,
                    "context_gib": found.context_gib,
                }
                values |= {"loss": found.loss, "gradient_norm": found.gradient_norm}
                figures |= {f"{name}_{key}": value for key, value in values.items()}
                said = f"{found.tokens_per_s:,.0f} tokens/s, {step_ms:.0f} ms a step, {found.held_gib:.1f} GiB"
                said += f", loss {found.loss:.3f}, gradient {found.gradient_norm:.4f}"
                console.print(f"{name}: {said}")
                if torch.cuda.is_available():
                    figures |= {f"{name}_{key}": value for key, value in profile_step(base, config, rows).items()}
            write_result(
                "step-profile",
                figures,
                {"steps": NUM_STEPS, "lengths": {kind: arguments.length or KINDS[kind][0] for kind in arguments.kinds}},
            )
            del base
            gc.collect()


if __name__ == "__main__":
    main()
