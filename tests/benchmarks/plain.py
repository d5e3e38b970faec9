"""The peer in training: a plain PyTorch + PEFT loop as most people write it, on a run's rows and at its rates.

Padded rows in random order with a mask, logits of every token, AdamW. `--liger` gives it Liger's kernels, as the best of the peers has
them, and `--our-order` the run's own order, by length, so that losses can be held against each other step by step. It runs in a process of
its own, which prints its figures as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cluster.models import ensure_model
from configs.loader import ROOT, load_chatbot
from configs.schema import ChatbotConfig
from data.prepare import prepare

NUM_WARMUP = 3
OURS_ALONE = (
    "train.precision=",
    "train.compile=",
    "train.packing=",
    "train.cuda_graphs=",
    "train.max_memory_gib=",
    "train.micro_batch_size=",
)


def measure_plain(config_file: str, overrides: list[str], steps: int, flags: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the plain loop's tokens/s, peak, losses and held-out loss; None where it failed, as for want of memory."""
    return _measure(config_file, tuple(word for word in overrides if not word.startswith(OURS_ALONE)), steps, flags)


@cache
def _measure(config_file: str, overrides: tuple[str, ...], steps: int, flags: tuple[str, ...]) -> dict[str, Any] | None:
    config = load_chatbot(config_file, overrides)
    data = prepare(config, ensure_model(config.model))
    words = ["--config", config_file, "--train-file", str(data.train_file), "--heldout-file", str(data.heldout_file), "--steps", str(steps)]
    command = [sys.executable, __file__, *words, *flags, *overrides]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        print(done.stderr[-1500:])
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def make_model(config: ChatbotConfig, folder: Path, device: str, with_liger: bool) -> Any:
    """Load the base and put an adapter beside it, as PEFT's own documentation does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised: dict[str, Any] = {}
    if config.train.quantization == "nf4":
        double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        quantised = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device}, **quantised)
    base.config.use_cache = False
    if with_liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base)
    if config.train.gradient_checkpointing is True:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    ours = config.train.lora
    left_out = (ours.num_layers, config.train.label_smoothing, config.train.optimizer_bits - 32, not config.train.double_quantization)
    assert not any(left_out), "the plain loop does not know train.lora.num_layers, label_smoothing, optimizer_bits, or single quantisation"
    settings = {"lora_dropout": ours.dropout, "use_rslora": ours.use_rslora, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules=ours.target_modules, **settings)
    return get_peft_model(base, lora, autocast_adapter_dtype=device == "cpu")


def main() -> None:
    """Train, evaluate, and print what came of it."""
    import torch
    from transformers import get_scheduler, set_seed

    from cluster.memory import EVALUATION_TOKENS
    from data.template import load_tokenizer
    from train.reporting import peak_memory_gib
    from train.rows import Padder, Row, RowOrder, read_rows

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--config", "--train-file", "--heldout-file"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--our-order", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_chatbot(arguments.config, arguments.overrides)
    train, folder = config.train, ensure_model(config.model)
    set_seed(train.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder)
    rows, heldout = (read_rows(Path(file), tokenizer, config.data) for file in (arguments.train_file, arguments.heldout_file))
    model = make_model(config, folder, device, arguments.liger)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    num_rising = round(min(arguments.steps, train.count_steps(len(rows))) * train.warmup_share)
    rates = get_scheduler(schedule, optimizer, num_rising, arguments.steps)
    pad = Padder(tokenizer.pad_token_id)

    def batch_of(chosen: list[Row]) -> dict[str, Any]:
        batch = {name: tensor.to(device) for name, tensor in pad(chosen).items()}
        lengths = torch.tensor([[len(row["input_ids"])] for row in chosen], device=device)
        return {**batch, "attention_mask": (torch.arange(batch["input_ids"].shape[1], device=device) < lengths).long()}

    def batches() -> Iterator[list[Row]]:
        order = RowOrder(rows, train.batch_size, train.seed, by_length=arguments.our_order)
        for epoch in range(arguments.steps):
            order.set_epoch(epoch)
            places = list(order)
            yield from ([rows[place] for place in places[at : at + train.batch_size]] for at in range(0, len(places), train.batch_size))

    losses, num_tokens, started_s = [], 0, 0.0
    model.train()
    for step, chosen in zip(range(arguments.steps), batches(), strict=False):
        if step == NUM_WARMUP:
            started_s = time.perf_counter()
        loss = model(**batch_of(chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        num_tokens += sum(len(row["input_ids"]) for row in chosen) if step >= NUM_WARMUP else 0
    took_s, peak_gib = time.perf_counter() - started_s, peak_memory_gib()
    model.eval()
    size = max(1, EVALUATION_TOKENS // max(len(row["input_ids"]) for row in heldout))
    parts = [heldout[at : at + size] for at in range(0, len(heldout), size)]
    with torch.no_grad():
        eval_loss = sum(float(model(**batch_of(part)).loss) * len(part) for part in parts) / len(heldout)
    found = {"tokens_per_s": num_tokens / took_s, "peak_memory_gib": peak_gib, "eval_loss": eval_loss}
    print(json.dumps({**found, "losses": [float(loss) for loss in losses]}))


if __name__ == "__main__":
    main()
