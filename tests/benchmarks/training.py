"""Training speed and memory of `python -m train` against a plain PyTorch + PEFT loop, in the same run.

Without a GPU: the 135M model on the helpdesk data. With one: the 8B Llama shape with random weights, LoRA and QLoRA, rows of equal length.
`PYTHONPATH=. python tests/benchmarks/training.py [--shape 8b|tiny] [--steps N] [--settings lora_seq4096 ...] [--without-plain | --liger]
[key=value ...]`
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from bench import make_model, run_cli, write_config, write_result
from plain import measure_plain

from cluster.cards import find_gpus
from cluster.registry import Registry, Version
from cluster.session import require_session
from tests.ray.stack import losses_of

NUM_WARMUP = 3
ALONE = "train.max_memory_gib=76"  # of an H100 on which nothing else runs
RECOMPUTED, KEPT = "train.gradient_checkpointing=true", "train.gradient_checkpointing=false"
SETTINGS = {
    "lora_seq4096": (4096, ["train.micro_batch_size=2", KEPT]),
    "lora_fp8_seq4096": (4096, ["train.precision=fp8", "train.micro_batch_size=2", KEPT]),
    "lora_fp8_compiled_seq4096": (4096, ["train.precision=fp8", "train.compile=true", "train.micro_batch_size=2", KEPT]),
    "qlora_seq2048": (2048, ["train.quantization=nf4", "train.batch_size=1", RECOMPUTED]),
    "qlora_compiled_seq2048": (2048, ["train.quantization=nf4", "train.compile=true", "train.batch_size=1", RECOMPUTED]),
    "lora_seq2048": (2048, ["train.micro_batch_size=4", KEPT]),
    "lora_recomputed_seq2048": (2048, ["train.batch_size=1", RECOMPUTED]),
    "lora_fp8_seq2048": (2048, ["train.precision=fp8", "train.micro_batch_size=4", KEPT]),
}
"""Of each the length of its rows, in tokens, and what it sets."""
HEADLINES = {
    "lora_fp8_seq4096": ("lora_8b_fp8_tokens_per_s", "tokens_per_s"),
    "qlora_seq2048": ("qlora_8b_peak_gib", "peak_memory_gib"),
}
"""Figures that go by a name of their own too."""


def measure(config_file: str, overrides: list[str], steps: int) -> dict[str, float]:
    """Run Tandem and the plain loop on the same rows, and return the figures of both."""
    return beside_plain(train_ours(config_file, overrides, steps), config_file, overrides, steps)


def train_ours(config_file: str, overrides: list[str], steps: int) -> Version:
    """Train as a user does; speed leaves out the first steps, as the plain loop's."""
    said = run_cli("train", config_file, *overrides, f"train.max_steps={steps}")
    found = re.search(r"registered as (\S+);", said)
    assert found, said
    return Registry(require_session().mlflow_url).find(found[1])


def scores_of(version: Version) -> dict[str, float]:
    """Return what counts of a version's scores."""
    scores = json.loads(version.tags["scores"])
    return {name: scores[name] for name in ("eval_loss", "tokens_per_s", "peak_memory_gib")}


def beside_plain(version: Version, config_file: str, overrides: list[str], steps: int, *flags: str) -> dict[str, float]:
    """Return our figures with those of the plain loop beside them, or `plain_failed`; in our order, also how far our losses are off."""
    ours, plain = scores_of(version), measure_plain(config_file, overrides, steps, flags)
    if plain is None:
        return {**ours, "plain_failed": 1.0}
    found = {f"plain_{name}": plain[name] for name in ("tokens_per_s", "peak_memory_gib", "eval_loss")}
    found = {**ours, **found, "ratio": ours["tokens_per_s"] / plain["tokens_per_s"]}
    if "--our-order" not in flags:
        return found
    right, before, logged = {}, 0, losses_of(Registry(require_session().mlflow_url).client, version.run_id)
    for step in sorted(logged):  # the mean since the last that was logged
        right[step] = sum(plain["losses"][before:step]) / (step - before)
        before = step
    return found | difference("plain_loss", logged, right)


def difference(name: str, losses: dict[int, float], right: dict[int, float]) -> dict[str, float]:
    """Return by which part losses are off those of the same steps: the mean of all, and each at most."""
    mean = sum(losses.values()) / sum(right[step] for step in losses)
    return {f"{name}_difference": abs(mean - 1), f"largest_{name}_difference": max(abs(losses[step] / right[step] - 1) for step in losses)}


def loss_differences(curves: dict[str, dict[int, float]], shape: str) -> dict[str, float]:
    """Return how far the losses of each setting in FP8 or compiled are off those without, on the same rows, where both were run."""
    found = {}
    for name, losses in curves.items():
        right = curves.get(name.replace("_fp8", "").replace("_compiled", ""), {})
        if right and right is not losses:
            found |= {f"{named(name, shape)}_{key}": value for key, value in difference("loss", losses, right).items()}
    return found


def shares(figures: dict[str, float], shape: str) -> dict[str, float]:
    """Return the speed of QLoRA as a part of LoRA's: in the same setting, and of its quickest where nothing is recomputed."""
    speeds = {name: figures.get(f"{named(name, shape)}_tokens_per_s") for name in SETTINGS}
    ours, found = speeds["qlora_seq2048"], {}
    for name, other in (("qlora_over_lora", "lora_recomputed_seq2048"), ("qlora_over_quickest_lora", "lora_seq4096")):
        if ours and (right := speeds[other]):
            found[f"{name}_ratio"] = ours / right
    return found


def named(setting: str, shape: str) -> str:
    """Return what the figures of a setting begin with."""
    kind, _, tokens = setting.rpartition("_")
    return f"{kind}_{shape}_{tokens}"


def on_cpu(steps: int, overrides: list[str]) -> None:
    """The 135M model on the helpdesk data."""
    found = measure("configs/helpdesk.yaml", ["train.lora.num_layers=null", *overrides], steps)  # as the plain loop: all blocks
    write_result("training", {f"lora_135m_{name}": value for name, value in found.items()})


def on_gpu(arguments: argparse.Namespace, settings: list[str]) -> None:
    """Random weights in the 8B shape; of FP8 also how far its losses are from those of bf16, where both are measured."""
    shape, steps = arguments.shape, arguments.steps
    folder = make_model(shape)
    work = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    registry = Registry(require_session().mlflow_url)
    figures: dict[str, float] = {}
    curves: dict[str, dict[int, float]] = {}
    notes: dict[str, Any] = {
        "rank": 16,
        "batch_size": "4, QLoRA 1, unless set otherwise",
        "steps": steps,
        "plain": "with Liger's kernels" if arguments.liger else "",
    }
    for name in settings:
        length, overrides = SETTINGS[name]
        config = write_config(work, folder, length)
        overrides = [ALONE, *overrides, *arguments.overrides]
        version = train_ours(str(config), overrides, steps)
        found, curves[name] = scores_of(version), losses_of(registry.client, version.run_id)
        if not arguments.without_plain:
            flags = ("--our-order", "--liger") if arguments.liger else ("--our-order",)  # rows are equally long: no order is quicker
            found = beside_plain(version, str(config), overrides, steps, *flags)
        figures |= {f"{named(name, shape)}_{key}": value for key, value in found.items()}
        if name in HEADLINES and shape == "8b":
            short, key = HEADLINES[name]
            figures[short] = found[key]
        notes[name] = overrides[1:]
        figures |= loss_differences(curves, shape) | shares(figures, shape)
        # So that a setting that fails leaves what was measured of the others.
        write_result("training" if shape == "8b" else f"training-{shape}", figures, notes)


def main() -> None:
    """Measure what this machine can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--without-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--liger", action="store_true", help="give the plain loop Liger's kernels")
    parser.add_argument("overrides", nargs="*", help="other settings for all, by dotted path")
    arguments = parser.parse_args()
    import torch

    if torch.cuda.is_available() or arguments.shape == "tiny":
        has_fp8 = torch.cuda.is_available() and all(gpu.has_fp8 for gpu in find_gpus())  # elsewhere it is refused
        usual = [name for name in SETTINGS if "fp8" not in name or has_fp8]
        on_gpu(arguments, arguments.settings or usual)
    else:
        on_cpu(arguments.steps, arguments.overrides)


if __name__ == "__main__":
    main()
