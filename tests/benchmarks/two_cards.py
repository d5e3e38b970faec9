"""Training on two cards against one, as jobs of the queue, on a Tandem of its own; the data-parallel workers are a card each.

`PYTHONPATH=. python tests/benchmarks/two_cards.py [--shape 8b|tiny] [--length 2048] [--steps N]`
Each worker has the rows of a step that one has alone. On cards that share the machine's cores it is a rehearsal.
"""

import argparse
import json
import tempfile
from contextlib import closing
from pathlib import Path

from bench import SHAPES, make_model, write_config, write_result
from lending import PORTS
from training import ALONE, KEPT

from cluster.cards import find_gpus
from cluster.job_queue import DONE, STANDING, Queue, QueuedJob
from cluster.processes import free_port
from tests.ray.stack import Stack, wait_for

ROWS_A_WORKER = 4
TIMEOUT_S = 900


def run_job(stack: Stack, config: Path, num_workers: int, steps: int) -> dict[str, float]:
    """Let a job train to its end, and return its scores."""
    settings = [f"name=workers{num_workers}", f"train.num_workers={num_workers}", f"train.batch_size={ROWS_A_WORKER * num_workers}"]
    settings += [ALONE, KEPT, f"train.micro_batch_size={ROWS_A_WORKER}", f"train.max_steps={steps}"]
    done = stack.run("cluster", "submit", str(config), *settings)
    assert done.returncode == 0, done.stderr

    def ended() -> QueuedJob | None:
        with closing(Queue(stack.home / "queue.db")) as queue:
            job = queue.jobs()[-1]
        return None if job.state in STANDING else job

    job = wait_for(ended, TIMEOUT_S)
    assert job.state == DONE, job.reason
    (version,) = [version for version in stack.registry.versions() if version.run_id == job.run_id]
    scores: dict[str, float] = json.loads(version.tags["scores"])
    return scores


def main() -> None:
    """Measure one card, then two, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--length", type=int, default=2048, help="of the rows, in tokens")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    config = write_config(work, make_model(arguments.shape), arguments.length)
    stack = Stack(work / "home", work, {name: free_port() for name in PORTS})
    machine = [f"{name}={port}" for name, port in stack.ports.items() if name != "chat"]
    cards = [] if find_gpus() else ["cards=[{pool: serve}, {pool: train}]"]
    done = stack.run("cluster", "up", "auto", *cards, *machine, "lending.enabled=true")
    assert done.returncode == 0, done.stderr
    try:
        one, two = (run_job(stack, config, num_workers, arguments.steps) for num_workers in (1, 2))
    finally:
        stack.run("cluster", "down")
    figures = {f"{name}_{key}": scores[key] for name, scores in (("one", one), ("two", two)) for key in ("tokens_per_s", "peak_memory_gib")}
    figures["two_cards_ratio"] = two["tokens_per_s"] / one["tokens_per_s"]
    notes = {"sequence_tokens": arguments.length, "rows_a_worker": ROWS_A_WORKER, "steps": arguments.steps}
    write_result("two-cards" if arguments.shape == "8b" else f"two-cards-{arguments.shape}", figures, notes)


if __name__ == "__main__":
    main()
