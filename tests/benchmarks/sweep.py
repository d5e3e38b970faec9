"""ASHA against the full grid: the same nine trials of the helpdesk bot, each trained to its end, and then by `tune.scheduler=asha`.

Wants a cluster that is up. `PYTHONPATH=. python tests/benchmarks/sweep.py [--model FOLDER] [--steps N] [key=value ...]`
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from typing import Any

from bench import write_result

from cluster.home import home_folder
from configs.loader import ROOT

CONFIG = "configs/helpdesk.yaml"


def run_sweep(scheduler: str, settings: list[str]) -> tuple[dict[str, Any], float]:
    """Run one sweep as its user does, showing what it says; return what it wrote down, and its seconds."""
    started_s = time.monotonic()
    words = [sys.executable, "-m", "tune", CONFIG, f"tune.scheduler={scheduler}", *settings]
    said = ""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
    found = re.search(r"sweep ([0-9a-f]{32})", said)
    assert found, said
    assert process.returncode == 0, said[-2000:]
    written = json.loads((home_folder() / "sweeps" / found[1] / "summary" / "trials.json").read_text())
    return written, time.monotonic() - started_s


def best(written: dict[str, Any]) -> float:
    """Return the best held-out loss of any trial that did not fail."""
    return min(trial["score"] for trial in written["trials"] if trial["score"] is not None and not trial["reason"])


def outline(trial: dict[str, Any]) -> dict[str, Any]:
    """Return what of a trial is kept with the result."""
    return {**trial["settings"], "score": trial["score"], "share": trial["looks"][-1]["share"] if trial["looks"] else 0}


def main() -> None:
    """Run both, and write down score and price."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another base model than the config's")
    parser.add_argument("--steps", type=int, help="of a whole trial; the config's epochs if left out")
    parser.add_argument("overrides", nargs="*", help="other settings, by dotted path")
    arguments = parser.parse_args()
    settings = [f"model.name={arguments.model}"] if arguments.model else []
    settings += [f"train.max_steps={arguments.steps}"] if arguments.steps else []
    settings += arguments.overrides
    (grid, grid_s), (asha, asha_s) = run_sweep("grid", settings), run_sweep("asha", settings)
    figures = {
        "grid_best_heldout_loss": best(grid),
        "asha_best_heldout_loss": best(asha),
        "asha_over_grid_loss": best(asha) / best(grid),
        "asha_over_grid_perplexity": math.exp(best(asha) - best(grid)),
        "grid_tokens": grid["figures"]["num_tokens"],
        "asha_tokens": asha["figures"]["num_tokens"],
        "asha_over_grid_tokens": asha["figures"]["num_tokens"] / grid["figures"]["num_tokens"],
        "grid_s": grid_s,
        "asha_s": asha_s,
    }
    trials = {name: [outline(trial) for trial in written["trials"]] for name, written in (("grid", grid), ("asha", asha))}
    write_result("sweep", figures, {"model": arguments.model or "smollm2-135m", "settings": settings, **trials})


if __name__ == "__main__":
    main()
