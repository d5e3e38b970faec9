"""Two cards under bursts of chat while jobs train: each with a fixed job of its own, against cards that lend themselves.

`PYTHONPATH=. python tests/benchmarks/lending.py [--config CONFIG | --shape 8b] [--minutes 10] [key=value ...]`.

It starts a Tandem of its own twice, the second time with `lending.enabled=true`; in both two training jobs wait in line, of which the
fixed split can only ever run one. A third of the time there are bursts of chat. A request counts as asleep that was sent while no engine
answered: none was there, or it started. Where there are four GPUs, each way has two of them, at the same time; so it is without a GPU
where `--cores N` gives each card N cores of its own.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx
from bench import SHAPES, loss_history, make_model, steps_lost, write_config, write_result

from cluster.cards import Gpu, find_gpus
from cluster.job_queue import STANDING, Queue, QueuedJob
from cluster.models import served_base_name
from cluster.processes import free_port
from cluster.ray_ground import APPLICATION, SERVE_API
from cluster.rule import SERVE, TRAIN
from configs.cli import console
from configs.loader import load_chatbot
from tests.ray.stack import Stack, make_config, make_tiny_model, wait_for

NUM_BURSTS, BURST_SHARE = 4, 1 / 3
NUM_ASKING = 3
MAX_TOKENS = 24
LENGTH_TOKENS = 1024
QUESTION = "How do I start?"
WHOLE = {"temperature": 0, "ignore_eos": True}  # each answer has all its tokens
PORTS = ("ray_port", "dashboard_port", "mlflow_port", "chat")
FOREVER = ("train.max_steps=1000000", "train.log_every_steps=1", "train.checkpoint_every_steps=100")
WAYS = ("fixed", "lending")
ONE_ENGINE = ("serve.scaling.min_replicas=1", "serve.scaling.max_replicas=1", "serve.scaling.use_train_cards=false")


@dataclass
class Asked:
    """One request."""

    sent_s: float
    was_asleep: bool
    first_token_s: float = 0.0
    error: str = ""
    is_over: bool = False


@dataclass
class Watch:
    """What was seen of the cards, about once a second."""

    pools: dict[str, str]
    """Of each card."""
    looks: int = 0
    busy: Counter[str] = field(default_factory=Counter)
    """How often each card was."""

    def look(self, jobs: list[QueuedJob], is_asked: bool) -> None:
        """Count the cards that somebody uses: jobs that have made a step since they have them, and chat while somebody waits for it."""
        self.looks += 1
        training = {card for job in jobs if job.num_steps for card in job.cards}
        self.busy.update(card for card, pool in self.pools.items() if card in training or (pool == SERVE and is_asked))

    def busy_share(self, pool: str) -> float:
        """Return the share of the time in which the cards of a pool were busy."""
        cards = [card for card, found in self.pools.items() if found == pool]
        return sum(self.busy[card] for card in cards) / (self.looks * len(cards))


class Way:
    """One way to share the cards, under the same requests."""

    def __init__(self, arguments: argparse.Namespace, lends: bool, gpus: Sequence[Gpu], number: int = 0) -> None:
        self.gpus = gpus
        self.cards = "[{pool: serve}, {pool: train}]"
        if num := arguments.cores:
            there = sorted(os.sched_getaffinity(0))[2 * number * num :]
            serve, train = (",".join(map(str, cores)) for cores in (there[:num], there[num : 2 * num]))
            self.cards = f"[{{pool: serve, cores: '{serve}'}}, {{pool: train, cores: '{train}'}}]"
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-lending-"))
        self.stack = Stack(self.folder / "home", self.folder, {name: free_port() for name in PORTS}, gpus=[gpu.index for gpu in gpus])
        self.lends, self.minutes, self.overrides = lends, arguments.minutes, arguments.overrides
        settings = f"enabled: {str(lends).lower()}, quiet_after_s: {arguments.quiet_s}, idle_engine: {arguments.idle_engine}, min_hold_s: 0"
        self.lending = f"lending={{{settings}}}"
        self.config, self.shape = Path(arguments.config) if arguments.config else None, arguments.shape
        self.asked: list[Asked] = []
        self.over = threading.Event()
        self.began_s = self.ended_s = 0.0

    def measure(self) -> dict[str, float]:
        """Run the trace, and return what came of it."""
        cards = [] if self.gpus else [f"cards={self.cards}"]
        machine = [f"{name}={port}" for name, port in self.stack.ports.items() if name != "chat"]
        self._do("cluster", "up", "auto", *cards, *machine, self.lending)
        try:
            if self.shape:
                self.config = write_config(self.folder, make_model(self.shape), LENGTH_TOKENS)
            elif self.config is None:
                self.config = make_config(self.folder, make_tiny_model(self.folder / "model"), self.stack.ports["chat"])
            settings = [f"serve.port={self.stack.ports['chat']}", *ONE_ENGINE, *self.overrides]
            self._submit(1)  # which starts while the engine does; a second one would have the serve card before chat
            self._do("serve", str(self.config), *settings)
            self.model = served_base_name(load_chatbot(str(self.config), self.overrides).model.name)
            self._submit(2)
            wait_for(lambda: sum(bool(job.num_steps) for job in self._jobs()) == 1 + self.lends, timeout_s=600)  # begin in a quiet
            self._trace()
            return self._figures()
        finally:
            self.over.set()
            self.stack.run("cluster", "down")

    def _submit(self, number: int) -> None:
        self._do("cluster", "submit", str(self.config), *self.overrides, *FOREVER, f"name=job{number}")

    def _do(self, *words: str) -> None:
        done = self.stack.run(*words, timeout_s=900)
        if done.returncode:
            raise SystemExit(f"python -m {' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")

    def _jobs(self) -> list[QueuedJob]:
        with closing(Queue(self.stack.home / "queue.db")) as queue:
            return queue.jobs(*STANDING)

    def _trace(self) -> None:
        """Quiet, then a burst, so many times."""
        cards = json.loads((self.stack.home / "cluster.json").read_text())["cards"]
        self.watch = Watch({card["card"]: card["pool"] for card in cards})
        watcher = threading.Thread(target=self._look, daemon=True)
        self.began_s = time.time()
        self.ended_s = self.began_s + self.minutes * 60
        watcher.start()
        whole_s = self.minutes * 60 / NUM_BURSTS
        for number in range(1, NUM_BURSTS + 1):
            until_s = self.began_s + number * whole_s  # by the clock: both ways have as long, however late their answers come
            time.sleep(max(0.0, until_s - whole_s * BURST_SHARE - time.time()))
            threads = [threading.Thread(target=self._burst, args=(until_s,)) for _ in range(NUM_ASKING)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            console.print(f"burst {number}: {len(self.asked)} requests, {sum(one.was_asleep for one in self.asked)} while asleep")
        self.over.set()
        watcher.join()

    def _look(self) -> None:
        while not self.over.wait(1.0) and time.time() < self.ended_s:
            self.watch.look(self._jobs(), any(not one.is_over for one in self.asked))

    def _burst(self, until_s: float) -> None:
        while time.time() < until_s:
            asked = Asked(0.0, was_asleep=not self._is_awake())
            asked.sent_s = time.monotonic()
            self.asked.append(asked)
            try:
                self._ask(asked)
            except httpx.HTTPError as error:
                asked.error = repr(error)
            finally:
                asked.is_over = True

    def _is_awake(self) -> bool:
        """Whether an engine answers: one that starts, leaves or sleeps does not."""
        headers = {"Authorization": f"Bearer {(self.stack.home / 'ray_token').read_text().strip()}"}
        address = f"http://127.0.0.1:{self.stack.ports['dashboard_port']}{SERVE_API}"
        chat = httpx.get(address, headers=headers, timeout=60).json()["applications"].get(APPLICATION, {})
        replicas = [replica for entry in chat.get("deployments", {}).values() for replica in entry["replicas"]]
        return any(replica["state"] == "RUNNING" and self._has_card(replica["pid"]) for replica in replicas)

    def _has_card(self, pid: int) -> bool:
        """Whether an engine has its card, by what it tells of itself."""
        return (self.stack.home / "activity" / str(pid)).read_text().split()[-1] in ("awake", "unknown")

    def _ask(self, asked: Asked) -> None:
        body = {"model": self.model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS, "stream": True, **WHOLE}
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
        histories = [loss_history(self.stack.registry.client, job.run_id) for job in self._jobs()]
        steps = [{step for at_s, step in history if self.began_s <= at_s <= self.ended_s} for history in histories]
        before = [{step for at_s, step in history if at_s < self.began_s} for history in histories]
        figures: dict[str, float] = {
            "requests": len(self.asked),
            "failed": sum(bool(one.error) for one in self.asked),
            "awake": len(awake),
            "steps_done": sum(len(now - then) for now, then in zip(steps, before, strict=True)),
            "steps_lost": sum(number for history in histories for number in steps_lost(history)),
            "train_card_busy_share": self.watch.busy_share(TRAIN),
            "serve_card_busy_share": self.watch.busy_share(SERVE),
        }
        if len(awake) > 1:
            figures |= {"ttft_awake_p50_s": median(awake), "ttft_awake_p95_s": quantiles(awake, n=20, method="inclusive")[-1]}
        if asleep:
            figures |= {"asleep": len(asleep), "ttft_asleep_p50_s": median(asleep), "ttft_asleep_max_s": max(asleep)}
        if took_s := self._took_s_to_leave():
            figures |= {"handovers": len(took_s), "leave_p50_s": median(took_s), "leave_max_s": max(took_s)}
        for error in {one.error for one in self.asked if one.error}:
            console.print(f"failed: {error}")
        console.print({name: round(value, 4) for name, value in figures.items()})
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
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--config", help="a chatbot's YAML file; a tiny model of the benchmark's own if left out")
    kinds.add_argument("--shape", choices=SHAPES, help=f"random weights in a shape, and rows of {LENGTH_TOKENS} tokens, instead")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the trace, for each way")
    parser.add_argument("--quiet-s", type=float, default=10.0, help="lending.quiet_after_s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what is measured")
    parser.add_argument("--idle-engine", choices=["auto", "sleep", "stop"], default="auto", help="lending.idle_engine")
    parser.add_argument("--cores", type=int, default=0, help="of each card its own, without GPUs; both ways then run at the same time")
    parser.add_argument("overrides", nargs="*", help="other settings, by dotted path")
    arguments = parser.parse_args()
    gpus = find_gpus()
    if arguments.cores and gpus:
        parser.error("--cores is of cards without a GPU; CUDA_VISIBLE_DEVICES= hides those that are there")
    if len(gpus) >= 2 * len(WAYS) or arguments.cores:
        ways = {way: Way(arguments, way == "lending", gpus[2 * number :][:2], number) for number, way in enumerate(arguments.ways)}
        with ThreadPoolExecutor() as pool:
            found = dict(zip(ways, pool.map(Way.measure, ways.values()), strict=True))
    else:
        found = {way: Way(arguments, way == "lending", gpus[:2]).measure() for way in arguments.ways}
    figures = {f"{way}_{name}": value for way, measured in found.items() for name, value in measured.items()}
    if len(found) == len(WAYS):
        figures["steps_ratio"] = found["lending"]["steps_done"] / found["fixed"]["steps_done"]
        if "ttft_awake_p95_s" in found["lending"]:
            figures["ttft_awake_p95_ratio"] = found["lending"]["ttft_awake_p95_s"] / found["fixed"]["ttft_awake_p95_s"]
    shared = f"of {arguments.cores} cores each, both ways at once" if arguments.cores else "that share the machine's cores"
    cards = "of their own memory and speed" if gpus else shared
    notes = {
        "minutes": arguments.minutes,
        "idle_engine": arguments.idle_engine,
        "config": arguments.config or arguments.shape or "tiny",
        "quiet_after_s": arguments.quiet_s,
        "settings": arguments.overrides,
        "cards": cards,
    }
    kind = Path(arguments.config).stem if arguments.config else arguments.shape
    write_result(f"lending-{kind}" if kind else "lending", figures, notes)


if __name__ == "__main__":
    main()
