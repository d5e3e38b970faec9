"""Training speed and memory of `python -m train` against a plain PyTorch + PEFT loop, in the same run.

Without a GPU: the 135M model on the helpdesk data. With one: the 8B Llama shape with random weights, LoRA and QLoRA, rows of equal length.
`PYTHONPATH=. python tests/benchmarks/training.py [--shape 8b|tiny] [--steps N] [--settings lora_seq4096 ...] [--without-plain]`
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import make_model, run_cli, write_config, write_result

from cluster.cards import find_gpus
from cluster.models import ensure_model
from cluster.registry import Registry, Version
from cluster.session import require_session
from configs.loader import ROOT, load_chatbot
from data.prepare import prepare
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
    "lora_checkpointing_seq2048": (2048, ["train.micro_batch_size=4", RECOMPUTED]),
    "lora_fp8_seq2048": (2048, ["train.precision=fp8", "train.micro_batch_size=4", KEPT]),
}
"""Of each the length of its rows, in tokens, and what it sets."""
HEADLINES = {
    "lora_fp8_seq4096": ("lora_8b_fp8_tokens_per_s", "tokens_per_s"),
    "qlora_seq2048": ("qlora_8b_peak_gib", "peak_memory_gib"),
}
"""Figures that go by a name of their own too."""


def plain_loop(arguments: argparse.Namespace) -> None:
    """Train as most people do with PEFT: padded rows, logits of every token, AdamW; print tokens/s and peak memory as JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    from data.template import load_tokenizer
    from train.reporting import peak_memory_gib
    from train.rows import Padder, read_rows

    set_seed(0)
    config = load_chatbot(arguments.config, arguments.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = ensure_model(config.model)
    tokenizer = load_tokenizer(folder)
    rows = read_rows(Path(arguments.train_file), tokenizer, config.data)
    quantised: dict[str, Any] = {}
    if config.train.quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        quantised = {"quantization_config": settings}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}, **quantised)
    base.config.use_cache = False
    if config.train.gradient_checkpointing is True:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    ours = config.train.lora
    lora = LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules=ours.target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=device == "cpu")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate)
    pad, size = Padder(tokenizer.pad_token_id), config.train.batch_size
    order = random.Random(0)
    num_tokens, started_s = 0, 0.0
    model.train()
    for step in range(arguments.steps + NUM_WARMUP):
        if step == NUM_WARMUP:
            started_s = time.perf_counter()
        chosen = order.sample(rows, size)
        batch = {name: tensor.to(device) for name, tensor in pad(chosen).items()}
        lengths = torch.tensor([[len(row["input_ids"])] for row in chosen], device=device)
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1], device=device) < lengths).long()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        num_tokens += sum(len(row["input_ids"]) for row in chosen) if step >= NUM_WARMUP else 0
    print(json.dumps({"tokens_per_s": num_tokens / (time.perf_counter() - started_s), "peak_memory_gib": peak_memory_gib()}))


def measure(config_file: str, overrides: list[str], steps: int) -> dict[str, float]:
    """Run Tandem and the plain loop on the same rows; return tokens/s and peak of both, or `plain_failed` in the place of the latter's."""
    return measure_plain(config_file, overrides, steps, scores_of(train_ours(config_file, overrides, steps)))


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


def measure_plain(config_file: str, overrides: list[str], steps: int, ours: dict[str, float]) -> dict[str, float]:
    """Return our figures with those of the plain loop beside them."""
    config = load_chatbot(config_file, overrides)
    data = prepare(config, ensure_model(config.model))
    files = ["--config", config_file, "--train-file", str(data.train_file)]
    command = [sys.executable, __file__, "--plain", *files, "--steps", str(steps), *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        print(done.stderr[-1500:])  # such as no memory where Tandem had enough: that is a result too
        return {**ours, "plain_failed": 1.0}
    plain = json.loads(done.stdout.strip().splitlines()[-1])
    found = {f"plain_{name}": plain[name] for name in ("tokens_per_s", "peak_memory_gib")}
    return {**ours, **found, "ratio": ours["tokens_per_s"] / plain["tokens_per_s"]}


def loss_differences(curves: dict[str, dict[int, float]], shape: str) -> dict[str, float]:
    """Return by which part the losses of each setting in FP8 or compiled are off those without, on the same rows, where both were run.

    The mean of all steps, and each of them at most.
    """
    found = {}
    for name, losses in curves.items():
        right = curves.get(name.replace("_fp8", "").replace("_compiled", ""), {})
        if right and right is not losses:
            found[f"{named(name, shape)}_loss_difference"] = abs(sum(losses.values()) / sum(right[step] for step in losses) - 1)
            found[f"{named(name, shape)}_largest_loss_difference"] = max(abs(losses[step] / right[step] - 1) for step in losses)
    return found


def named(setting: str, shape: str) -> str:
    """Return what the figures of a setting begin with."""
    kind, _, tokens = setting.rpartition("_")
    return f"{kind}_{shape}_{tokens}"


def on_cpu(steps: int) -> None:
    """The 135M model on the helpdesk data."""
    found = measure("configs/helpdesk.yaml", ["train.lora.num_layers=null"], steps)  # as the plain loop: all blocks
    write_result("training", {f"lora_135m_{name}": value for name, value in found.items()})


def on_gpu(shape: str, steps: int, settings: list[str], with_plain: bool) -> None:
    """Random weights in the 8B shape; of FP8 also how far its losses are from those of bf16, where both are measured."""
    folder = make_model(shape)
    work = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    registry = Registry(require_session().mlflow_url)
    figures: dict[str, float] = {}
    curves: dict[str, dict[int, float]] = {}
    notes: dict[str, Any] = {"rank": 16, "batch_size": "4, QLoRA 1", "steps": steps}
    for name in settings:
        length, overrides = SETTINGS[name]
        config = write_config(work, folder, length)
        version = train_ours(str(config), [ALONE, *overrides], steps)
        found, curves[name] = scores_of(version), losses_of(registry.client, version.run_id)
        if with_plain:
            found = measure_plain(str(config), [ALONE, *overrides], steps, found)
        figures |= {f"{named(name, shape)}_{key}": value for key, value in found.items()}
        if name in HEADLINES and shape == "8b":
            short, key = HEADLINES[name]
            figures[short] = found[key]
        notes[name] = overrides
        figures |= loss_differences(curves, shape)
        # So that a setting that fails leaves what was measured of the others.
        write_result("training" if shape == "8b" else f"training-{shape}", figures, notes)


def main() -> None:
    """Measure what this machine can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--without-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--config")
    parser.add_argument("--train-file")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    import torch

    if arguments.plain:
        plain_loop(arguments)
    elif torch.cuda.is_available() or arguments.shape == "tiny":
        has_fp8 = torch.cuda.is_available() and all(gpu.has_fp8 for gpu in find_gpus())  # elsewhere it is refused
        usual = [name for name in SETTINGS if "fp8" not in name or has_fp8]
        on_gpu(arguments.shape, arguments.steps, arguments.settings or usual, not arguments.without_plain)
    else:
        on_cpu(arguments.steps)


if __name__ == "__main__":
    main()
