"""Rows of real lengths: useful tokens a second when packed, when sorted by length, and in a plain loop that pads; and held-out loss.

The 135M model on the helpdesk data, and on conversations of which most are short and a few very long. Wants a cluster that is up. Packed
steps run kernel by kernel, and with `--graphs` as CUDA graphs as well.
`PYTHONPATH=. python tests/benchmarks/packing.py [--model FOLDER] [--steps N] [--batch-size N] [--graphs]`
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from bench import WORDS, write_result
from training import measure

NUM_ROWS, MEDIAN_WORDS, SPREAD, MAX_WORDS = 1200, 40, 1.2, 1600
MAX_TOKENS = 2048


def write_long_tailed(file: Path) -> Path:
    """Write conversations whose lengths are log-normal, as those of people are."""
    chance = random.Random(0)
    rows = []
    for number in range(NUM_ROWS):
        num_words = min(MAX_WORDS, 4 + int(chance.lognormvariate(0.0, SPREAD) * MEDIAN_WORDS))
        answer = " ".join(chance.choice(WORDS) for _ in range(num_words))
        messages = [{"role": "user", "content": f"Tell story {number}."}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "split": "heldout" if number % 16 == 0 else "train"}))
    file.write_text("\n".join(rows) + "\n")
    return file


def main() -> None:
    """Measure both sets of rows, and write the result after each, so that a failure leaves what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another base model than the config's")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--graphs", action="store_true")
    arguments = parser.parse_args()
    long_tailed = write_long_tailed(Path(tempfile.mkdtemp(prefix="tandem-bench-")) / "rows.jsonl")
    shared = ["train.lora.num_layers=null", f"train.batch_size={arguments.batch_size}", "train.gradient_checkpointing=false"]
    shared += [f"model.name={arguments.model}"] if arguments.model else []
    long_rows = [f"data.max_length_tokens={MAX_TOKENS}", f"serve.max_model_len_tokens={MAX_TOKENS}", "data.too_long=cut"]
    sets = {"helpdesk": [], "long_tailed": [f"data.source={long_tailed}", *long_rows]}
    figures: dict[str, float] = {}
    for name, settings in sets.items():
        ways = {"packed": ["train.packing=true", "train.cuda_graphs=false"], "by_length": ["train.packing=false"]}
        ways |= {"packed_as_graphs": ["train.packing=true", "train.cuda_graphs=true"]} if arguments.graphs else {}
        for way, how in ways.items():
            found = measure("configs/helpdesk.yaml", [*shared, *settings, *how], arguments.steps)
            kept = ("tokens_per_s", "eval_loss", "peak_memory_gib")
            figures |= {f"{name}_{way}_{key}": found[key] for key in kept}
            if "ratio" in found:  # the plain loop may have failed, for want of memory
                figures[f"{name}_{way}_over_padded"] = found["ratio"]
                figures |= {f"{name}_padded_{key}": found[f"plain_{key}"] for key in kept}
        write_result("packing", figures, {"batch_size": arguments.batch_size, "steps": arguments.steps})


if __name__ == "__main__":
    main()
