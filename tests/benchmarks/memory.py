"""What the plan says of a step's memory, against what the step takes: LoRA and QLoRA, three shapes, two lengths, recomputed or not.

`PYTHONPATH=. python tests/benchmarks/memory.py [--shapes 135m 1b 8b | tiny] [--bases none nf4] [--steps N] [--only PART]
[--without-graphs] [--rows FILE]`

Measured is all that the driver counts as used when the step is at its worst: what torch's allocator holds then (`max_memory_reserved`), and
what is used beside it (the context: driver, kernels, cuBLAS); the same is predicted. It is what runs out; tensors alone are less. The
process must be alone on its card. Without a GPU it is resident memory, which never shrinks: a rehearsal of the script, not of the figures.

One process, and the allocator emptied between settings: a base is made once for all that share it. Each row is written as it comes, a
setting without enough memory is a row that says so, and a run that was ended goes on where it was, with the same `--rows`.
"""

import argparse
import gc
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bench import SHAPES, VOCABULARY, write_result

from cluster.home import BYTES_PER_GIB
from cluster.memory import Device, Need, Rows, Step
from cluster.rates import find_rate, train_tokens_per_s
from cluster.shape import read_shape
from configs.cli import console
from configs.schema import ChatbotConfig
from train.model import pick_dtype
from train.probe import NUM_WARMUP_STEPS, make_base, make_rows, run_steps

ON_GPU = torch.cuda.is_available()
LENGTHS = {"tiny": (32, 64)}
MICRO_BATCHES = {"135m": 8, "1b": 4, "8b": 2, "tiny": 2}
PADDED_SHARE = 0.9  # length of every second row, where rows are filled up
EXTRAS: dict[str, dict[str, Any]] = {
    "accumulated": {"batch_size": 4, "micro_batch_size": 1},
    "dropout": {"lora": {"dropout": 0.1}},
    "rank64": {"lora": {"rank": 64}},
    "layers8": {"lora": {"num_layers": 8}},
    "mlp": {"lora": {"target_modules": ["gate_proj", "up_proj", "down_proj"]}},
    "smoothed": {"label_smoothing": 0.1},
    "packed": {"packing": True},
}


@dataclass(frozen=True)
class Setting:
    """One row of the result."""

    shape: str
    quantization: str
    length: int
    recomputes: bool
    extra: str = ""
    cuda_graphs: Literal["auto"] | bool = "auto"

    @property
    def name(self) -> str:
        """Such as `qlora_8b_2048_recomputed`."""
        words = ["lora" if self.quantization == "none" else "qlora", self.shape, str(self.length)]
        words += ["recomputed"] if self.recomputes else []
        return "_".join([*words, *([self.extra] if self.extra else [])])

    @property
    def config(self) -> ChatbotConfig:
        """The chatbot that would train like this."""
        size = MICRO_BATCHES[self.shape]
        train: dict[str, Any] = {
            "batch_size": size,
            "micro_batch_size": size,
            "gradient_checkpointing": self.recomputes,
            "cuda_graphs": self.cuda_graphs,
        }
        train |= {"quantization": self.quantization, **EXTRAS.get(self.extra, {})}
        data = {"source": "x", "max_length_tokens": self.length}
        return ChatbotConfig.model_validate({"name": "bench", "data": data, "train": train, "serve": {"max_model_len_tokens": 1 << 20}})

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the rows, in turn."""
        return (self.length, int(self.length * PADDED_SHARE)) if self.extra == "padded" else (self.length,)


@dataclass(frozen=True)
class Row:
    """What a setting came to."""

    setting: str
    predicted_gib: float
    measured_gib: float = 0.0
    held_gib: float = 0.0
    tensors_gib: float = 0.0
    predicted_tensors_gib: float = 0.0
    context_gib: float = 0.0
    tokens_per_s: float = 0.0
    predicted_tokens_per_s: float = 0.0
    failed: str = ""
    parts_gib: dict[str, float] = field(default_factory=dict)

    @property
    def error_percent(self) -> float:
        """How much too much the plan says, of what was measured."""
        return 100 * (self.predicted_gib / self.measured_gib - 1)


def settings_of(shape: str, quantization: str) -> Iterator[Setting]:
    """All that is measured on one base: lengths, recomputed or not, rows of two lengths, and on the middle shape what else there is."""
    lengths = LENGTHS.get(shape, (512, 2048))
    for length in lengths:
        for recomputes in (False, True):
            yield Setting(shape, quantization, length, recomputes)
    yield Setting(shape, quantization, lengths[-1], recomputes=False, extra="padded")
    if shape in ("1b", "tiny") and quantization == "none":
        for extra in EXTRAS if shape == "1b" else ("accumulated", "packed"):
            yield Setting(shape, quantization, lengths[-1], recomputes=False, extra=extra)


def model_config(shape: str) -> dict[str, Any]:
    """The shape as a model's config.json."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": VOCABULARY}
    return {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": shape in ("135m", "1b"), **SHAPES[shape], **ids}


def predict(setting: Setting) -> tuple[Step, Need]:
    """What the plan says."""
    config = setting.config
    rows = Rows(setting.length, setting.length - 1)
    device = Device(ON_GPU, pick_dtype(config.model).itemsize)
    step = Step(read_shape(model_config(setting.shape), setting.shape), config.train, rows, device)
    return step, step.need()


def measure(setting: Setting, base: Any, num_steps: int) -> Row:
    """Take the steps, and put what they took beside what was said."""
    step, need = predict(setting)
    rate = find_rate(torch.cuda.get_device_name()) if ON_GPU else None
    said: dict[str, Any] = {
        "setting": setting.name,
        "predicted_gib": need.gib,
        "predicted_tensors_gib": (need.total_bytes - need.lost - need.process) / BYTES_PER_GIB,
        "predicted_tokens_per_s": train_tokens_per_s(step, rate) if rate else 0.0,
        "parts_gib": {name: value / BYTES_PER_GIB for name, value in asdict(need).items()},
    }
    rows = make_rows(setting.lengths, setting.config.train.batch_size * (NUM_WARMUP_STEPS + num_steps), VOCABULARY)
    try:
        found = run_steps(base, setting.config, rows, num_steps)
    except torch.OutOfMemoryError as error:
        return Row(**said, failed=str(error).partition("\n")[0])
    figures = {"measured_gib": found.held_gib + found.context_gib, "held_gib": found.held_gib, "tensors_gib": found.tensors_gib}
    return Row(**said, **figures, context_gib=found.context_gib, tokens_per_s=found.tokens_per_s)


def read_rows(file: Path) -> dict[str, Row]:
    """What this run or an earlier one left."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.setting: row for row in rows}


def measure_all(arguments: argparse.Namespace, file: Path) -> None:
    """Measure what is not measured yet, one base after the other."""
    for shape in arguments.shapes:
        for quantization in arguments.bases:
            wanted = [setting for setting in settings_of(shape, quantization) if arguments.only in setting.name]
            if arguments.without_graphs:
                wanted = [replace(setting, cuda_graphs=False) for setting in wanted]
            wanted = [setting for setting in wanted if setting.name not in read_rows(file)]
            if not wanted:
                continue
            began_s = time.perf_counter()
            base = make_base(model_config(shape), wanted[0].config, max(setting.length for setting in wanted))
            console.print(f"{shape} {quantization}: base made in {time.perf_counter() - began_s:.0f} s")
            for setting in wanted:
                row = measure(setting, base, arguments.steps)
                with file.open("a") as stream:
                    stream.write(json.dumps(asdict(row)) + "\n")
                shown = f"failed: {row.failed}" if row.failed else f"measured {row.measured_gib:.2f} GiB, {row.error_percent:+.1f} %"
                console.print(f"{setting.name}: predicted {row.predicted_gib:.2f}, {shown}; {time.perf_counter() - began_s:.0f} s")
            del base
            gc.collect()


def main() -> None:
    """Measure on this machine, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=MICRO_BATCHES, default=["135m", "1b", "8b"] if ON_GPU else ["tiny"])
    parser.add_argument("--bases", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the names of what is to be measured, such as qlora_8b")
    parser.add_argument("--without-graphs", action="store_true", help="steps whose kernels are asked for one by one")
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "tandem-memory-rows.jsonl")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before all was measured"))
    try:
        measure_all(arguments, arguments.rows)
    finally:
        write(list(read_rows(arguments.rows).values()), "memory-asked" if arguments.without_graphs else "memory")


def write(rows: list[Row], name: str) -> None:
    """Write the result, of however many settings there are."""
    good = [row for row in rows if not row.failed]
    errors = [row.error_percent for row in good]
    figures: dict[str, float] = {"settings": len(rows), "failed": len(rows) - len(good)}
    if errors:
        mean = sum(map(abs, errors)) / len(errors)
        figures |= {"most_over_percent": max(errors), "most_under_percent": min(errors), "mean_error_percent": mean}
    for row in good:
        values = {"predicted_gib": row.predicted_gib, "measured_gib": row.measured_gib, "error_percent": row.error_percent}
        figures |= {f"{row.setting}_{name}": value for name, value in values.items()}
    notes = {"measured": "driver's used memory: most that torch's allocator held, and the context", "rows": [asdict(row) for row in rows]}
    write_result(name if ON_GPU else "memory-rehearsal", figures, notes)


if __name__ == "__main__":
    main()
