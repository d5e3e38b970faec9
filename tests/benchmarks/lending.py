"""Two cards under bursts of chat while jobs train: each with a fixed job of its own, against cards that lend themselves.

`PYTHONPATH=. python tests/benchmarks/lending.py [--config CONFIG] [--minutes 10] [key=value ...]`. It starts a Tandem of its own twice, the
second time with `lending.enabled=true`; in both two training jobs wait in line, of which the fixed split can only ever run one. A third
of the time there are bursts of chat. A request counts as asleep that was sent while there was no engine.
"""

import argparse
import json
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx
from bench import write_result

from cluster.cards import find_gpus
from cluster.job_queue import RUNNING, WAITING, Queue, QueuedJob
from cluster.processes import free_port
from configs.cli import console
from configs.loader import load_chatbot
from tests.ray.stack import Stack, make_config, make_tiny_model, wait_for

NUM_BURSTS, BURST_SHARE = 4, 1 / 3
NUM_ASKING = 3
MAX_TOKENS = 24
QUESTION = "How do I start?"
PORTS = ("ray_port", "dashboard_port", "mlflow_port", "chat")
FOREVER = ("train.max_steps=1000000", "train.checkpoint_every_steps=100")


@dataclass
class Asked:
    """One request."""

    sent_s: float
    was_asleep: bool
    first_token_s: float = 0.0
    error: str = ""


@dataclass
class Watch:
    """What was seen of the cards, about once a second."""

    looks: int = 0
    train_busy: int = 0
    serve_busy: int = 0
    first_steps: dict[tuple[int, str], int] = field(default_factory=dict)
    """By job and submission."""
    last_steps: dict[tuple[int, str], int] = field(default_factory=dict)

    def look(self, jobs: list[QueuedJob], num_asking: int) -> None:
        """Count the cards that somebody uses."""
        self.looks += 1
        cards = {card for job in jobs if job.num_steps for card in job.cards}
        self.train_busy += "card1" in cards
        self.serve_busy += bool(num_asking) or "card0" in cards
        for job in jobs:
            if job.num_steps and job.submission:
                key = job.id, job.submission
                self.first_steps.setdefault(key, job.first_step)
                self.last_steps[key] = max(job.step, self.last_steps.get(key, 0))

    def steps_done(self) -> int:
        """Return the steps of all jobs, each step once."""
        ids = {job_id for job_id, _ in self.last_steps}
        return sum(max(step for (other, _), step in self.last_steps.items() if other == job_id) for job_id in ids)

    def steps_lost(self) -> int:
        """Return the steps that were done twice, as far as looks can tell: where a job went on below what was seen of it."""
        lost, highest = 0, dict.fromkeys({job_id for job_id, _ in self.last_steps}, 0)
        for key, step in self.last_steps.items():  # in the order of their beginning
            lost += max(0, highest[key[0]] - self.first_steps[key])
            highest[key[0]] = max(highest[key[0]], step)
        return lost


class Way:
    """One way to share the cards, under the same requests."""

    def __init__(self, arguments: argparse.Namespace, lends: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-lending-"))
        self.stack = Stack(self.folder / "home", self.folder, {name: free_port() for name in PORTS})
        self.minutes, self.overrides = arguments.minutes, arguments.overrides
        self.lending = f"lending={{enabled: {str(lends).lower()}, quiet_after_s: {arguments.quiet_s}, min_hold_s: 0}}"
        self.config = Path(arguments.config) if arguments.config else None
        self.asked: list[Asked] = []
        self.watch, self.num_asking, self.over = Watch(), 0, threading.Event()

    def measure(self) -> dict[str, float]:
        """Run the trace, and return what came of it."""
        cards = [] if find_gpus() else ["cards=[{pool: serve}, {pool: train}]"]
        machine = [f"{name}={port}" for name, port in self.stack.ports.items() if name != "chat"]
        self._do("cluster", "up", "auto", *cards, *machine, self.lending)
        try:
            if self.config is None:
                self.config = make_config(self.folder, make_tiny_model(self.folder / "model"), self.stack.ports["chat"])
            settings = [f"serve.port={self.stack.ports['chat']}", "serve.scaling.min_replicas=1", *self.overrides]
            self._do("serve", str(self.config), *settings)
            self.model = load_chatbot(str(self.config), self.overrides).model.name
            for number in (1, 2):
                self._do("cluster", "submit", str(self.config), *self.overrides, *FOREVER, f"name=job{number}")
            wait_for(lambda: any(job.num_steps for job in self._jobs()), timeout_s=600)
            self._trace()
            return self._figures()
        finally:
            self.over.set()
            self.stack.run("cluster", "down")

    def _do(self, *words: str) -> None:
        done = self.stack.run(*words, timeout_s=900)
        if done.returncode:
            raise SystemExit(f"python -m {' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")

    def _jobs(self) -> list[QueuedJob]:
        with closing(Queue(self.stack.home / "queue.db")) as queue:
            return queue.jobs(RUNNING, WAITING, "leaving")

    def _trace(self) -> None:
        """Quiet, then a burst, so many times."""
        watcher = threading.Thread(target=self._look, daemon=True)
        watcher.start()
        whole_s = self.minutes * 60 / NUM_BURSTS
        for number in range(NUM_BURSTS):
            time.sleep(whole_s * (1 - BURST_SHARE))
            until_s = time.monotonic() + whole_s * BURST_SHARE
            threads = [threading.Thread(target=self._burst, args=(until_s,)) for _ in range(NUM_ASKING)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            console.print(f"burst {number + 1}: {len(self.asked)} requests, {self.watch.steps_done()} steps")
        self.over.set()
        watcher.join()

    def _look(self) -> None:
        while not self.over.wait(1.0):
            self.watch.look(self._jobs(), self.num_asking)

    def _burst(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            was_asleep = not self.stack.workers("ServeReplica")
            asked = Asked(time.monotonic(), was_asleep)
            self.asked.append(asked)
            self.num_asking += 1
            try:
                self._ask(asked)
            except httpx.HTTPError as error:
                asked.error = repr(error)
            finally:
                self.num_asking -= 1

    def _ask(self, asked: Asked) -> None:
        body = {"model": self.model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS, "stream": True}
        with httpx.stream("POST", f"{self.stack.endpoint}/chat/completions", json=body, timeout=300) as answer:
            if answer.status_code != 200:
                asked.error = f"{answer.status_code} {answer.read()[:200]!r}"
                return
            for line in answer.iter_lines():
                if line.startswith("data: {") and not asked.first_token_s and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    asked.first_token_s = time.monotonic() - asked.sent_s
        if not asked.first_token_s:
            asked.error = "the stream ended without a token"

    def _figures(self) -> dict[str, float]:
        awake = [one.first_token_s for one in self.asked if not one.error and not one.was_asleep]
        asleep = [one.first_token_s for one in self.asked if not one.error and one.was_asleep]
        figures: dict[str, float] = {
            "requests": len(self.asked),
            "failed": sum(bool(one.error) for one in self.asked),
            "ttft_awake_p50_s": median(awake) if awake else float("nan"),
            "ttft_awake_p95_s": quantiles(awake, n=20)[-1] if len(awake) > 1 else float("nan"),
            "steps_done": self.watch.steps_done(),
            "steps_lost": self.watch.steps_lost(),
            "train_card_busy_share": self.watch.train_busy / self.watch.looks,
            "serve_card_busy_share": self.watch.serve_busy / self.watch.looks,
        }
        if asleep:
            figures |= {"asleep": len(asleep), "ttft_asleep_p50_s": median(asleep), "ttft_asleep_max_s": max(asleep)}
        if took_s := self._took_s_to_leave():
            figures |= {"handovers": len(took_s), "leave_p50_s": median(took_s), "leave_max_s": max(took_s)}
        for error in {one.error for one in self.asked if one.error}:
            console.print(f"failed: {error}")
        return figures

    def _took_s_to_leave(self) -> list[float]:
        """Return the seconds from each wish that a job leave until it had saved its state and left."""
        with closing(Queue(self.stack.home / "queue.db")) as queue:
            handovers = queue.handovers(10_000)[::-1]
        asked_s: dict[str, float] = {}
        took_s = []
        for at_s, _, what, _ in handovers:
            if " is asked to leave" in what:
                asked_s[what.partition(" is")[0]] = at_s
            elif (job := what.partition(" left")[0]) in asked_s:
                took_s.append(at_s - asked_s.pop(job))
        return took_s


def main() -> None:
    """Measure both ways, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a chatbot's YAML file; a tiny model of the benchmark's own if left out")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the trace, for each way")
    parser.add_argument("--quiet-s", type=float, default=10.0, help="lending.quiet_after_s")
    parser.add_argument("overrides", nargs="*", help="other settings, by dotted path")
    arguments = parser.parse_args()
    fixed, lending = Way(arguments, lends=False).measure(), Way(arguments, lends=True).measure()
    figures = {f"fixed_{name}": value for name, value in fixed.items()} | {f"lending_{name}": value for name, value in lending.items()}
    figures["steps_ratio"] = lending["steps_done"] / fixed["steps_done"]
    figures["ttft_awake_p95_ratio"] = lending["ttft_awake_p95_s"] / fixed["ttft_awake_p95_s"]
    write_result("lending", figures, {"minutes": arguments.minutes, "config": arguments.config or "tiny", "settings": arguments.overrides})


if __name__ == "__main__":
    main()
