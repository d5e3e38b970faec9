"""Minutes in which all that Tandem is made of is killed, one after the other and at random moments, while jobs train and clients chat.

`PYTHONPATH=. python tests/benchmarks/chaos.py [--minutes 30] [--seed 0] [--note WORDS]`. It starts a Tandem of its own with a tiny model,
and sends SIGKILL to a run's worker or driver, an engine's replica or core, the arbiter, a card's raylet, the head, and MLflow's server:
the next one some seconds after all goes on again. Chat has spells of quiet, in which its card is lent to a third job, and its engine
sleeps; after a kill it asks. Ends with status 1 where something was lost: a job, a request that got neither an answer nor a 503 although
what it needed was there, more steps than lie between two checkpoints, or a card that takes no job any more.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx
from bench import loss_history, steps_lost, write_result

from cluster.cards import find_gpus
from cluster.job_queue import DONE, FAILED, RUNNING, STANDING, Queue, QueuedJob
from cluster.processes import free_port
from cluster.rule import SERVE
from configs.cli import console
from tests.ray.stack import Stack, make_config, make_tiny_model, wait_for

PORTS = ("ray_port", "dashboard_port", "mlflow_port", "chat")
SAVE_EVERY, SHORT_STEPS, FOREVER = 20, 100, 1_000_000
NUM_ASKING = 2
PAUSE_S = (2.0, 25.0)
CHATS_S, QUIET_S, QUIET_AFTER_S = 30.0, 45.0, 8.0
NUM_JOBS = 3  # in line, for two train cards and the one that chat lends
OUTLIVES_S = 4.0  # engines and workers end with their raylet, head or driver, and so much later
STOPS_S = 5.0  # a run that makes no step for so long was hit; an evaluation is shorter, and a new process takes longer
RECOVERS_WITHIN_S = 300.0
# Of each victim: its process' name and words of its command line, and whether chat and training need it.
VICTIMS = {
    "trainer": ("", "RayTrainWorker", False, True),
    "driver": ("python", "queue/", False, True),
    "engine": ("", "ServeReplica", True, False),
    "engine core": ("", "EngineCore", True, False),
    "arbiter": ("python", "cluster.arbitrate", False, False),
    "train card's raylet": ("raylet", '"pool": "train"', False, True),
    "head's raylet": ("raylet", '"pool": "serve"', True, True),
    "head": ("gcs_server", "", True, True),
    "MLflow": ("python", "mlflow server", False, False),
}

OF_A_JOB = ("trainer", "driver")


@dataclass
class Asked:
    """One request: when it was sent and ended, by the clock, and what came of it."""

    sent_s: float
    ended_s: float = 0.0
    said: str = ""

    @property
    def is_answered(self) -> bool:
        return self.said == "200"


@dataclass
class Kill:
    """One kill, and which jobs were running then."""

    victim: str
    at_s: float
    running: tuple[int, ...]
    whole_s: float = 0.0
    """When there was another in its place."""
    back_s: float = 0.0
    """When all went on again, as far as looks tell; training's own time is in its steps."""

    @property
    def stops_chat(self) -> bool:
        return VICTIMS[self.victim][2]

    @property
    def stops_training(self) -> bool:
        return VICTIMS[self.victim][3]


@dataclass
class Chaos:
    """What is killed, and what came of it."""

    stack: Stack
    config: Path
    model: Path
    chance: random.Random
    kills: list[Kill] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What is to be in the result and must not be."""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, length_s: float) -> None:
        """Kill one after the other until the time is over, each kind as often as the others."""
        until_s, victims = time.monotonic() + length_s, list[str]()
        threads = [threading.Thread(target=step) for step in [self._chat] * NUM_ASKING + [self._submit_short_ones]]
        for thread in threads:
            thread.start()
        try:
            while time.monotonic() < until_s:
                victims = victims or self.chance.sample(list(VICTIMS), len(VICTIMS))
                time.sleep(self.chance.uniform(*PAUSE_S))
                self._kill(victims.pop())
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def _kill(self, victim: str) -> None:
        name, words, *_ = VICTIMS[victim]
        found = self.stack.parts(name, words)
        if not found:
            console.print(f"{victim}: none is there now")
            return
        lent = {card["card"] for card in json.loads((self.stack.home / "cluster.json").read_text())["cards"] if card["pool"] == SERVE}
        # Who has a lent card leaves it when chat asks.
        before = {job.id: job for job in self.jobs() if job.state == RUNNING and job.num_steps and not lent & set(job.cards)}
        chosen = self.chance.choice(found)
        num_begun = self._num_arbiters()
        kill = Kill(victim, time.time(), tuple(before))
        chosen.kill()
        self.kills.append(kill)

        def is_whole() -> bool:
            if victim == "arbiter":
                return self._num_arbiters() > num_begun
            # The processes of a job end with it, and are as many as jobs.
            return victim in OF_A_JOB or sum(part.pid != chosen.pid for part in self.stack.parts(name, words)) >= len(found)

        try:
            wait_for(is_whole, timeout_s=RECOVERS_WITHIN_S)
            kill.whole_s = time.time()
            time.sleep(max(0.0, kill.at_s + OUTLIVES_S - time.time()))
            before |= {job.id: job for job in self.jobs() if job.id in before}
            wait_for(lambda: self._goes_on(kill, before), timeout_s=RECOVERS_WITHIN_S)
        except AssertionError:
            self.lost.append(f"{victim}, killed {len(self.kills)}.: not all goes on after {RECOVERS_WITHIN_S:g} s")
        kill.back_s = time.time()
        said = dict(Counter(one.said for one in self.asked))
        console.print(f"{victim}: all goes on after {kill.back_s - kill.at_s:.1f} s; jobs done: {len(self.jobs(DONE))}; answers: {said}")

    def _num_arbiters(self) -> int:
        """How many arbiters have begun their work so far: the next one waits for the end of the last."""
        return (self.stack.home / "logs" / "arbiter.log").read_text().count("is at work")

    def _goes_on(self, kill: Kill, before: dict[int, QueuedJob]) -> bool:
        """Whether chat answers, and the jobs get on."""
        chats = any(one.is_answered and one.sent_s > kill.at_s for one in self.asked[-50:])
        return chats and all(job.step > before[job.id].step or job.state not in STANDING for job in self.jobs() if job.id in before)

    def jobs(self, *states: str) -> list[QueuedJob]:
        """The line as it is."""
        with closing(Queue(self.stack.home / "queue.db")) as queue:
            return queue.jobs(*states)

    def submit(self, *words: str) -> int:
        """Put a job in line, as a user does; return its number."""
        done = self.stack.run("cluster", "submit", str(self.config), f"train.checkpoint_every_steps={SAVE_EVERY}", *words)
        if done.returncode:
            self.lost.append(f"submit: {done.stderr}")
        return self.jobs()[-1].id

    def _submit_short_ones(self) -> None:
        """Keep short jobs in line, beside the one that lasts."""
        while not self.over.wait(1.0):
            if len(self.jobs(*STANDING)) < NUM_JOBS:
                self.submit(f"train.max_steps={SHORT_STEPS}", "name=short")

    def _chat(self) -> None:
        while not self.over.is_set():
            if self._is_quiet():
                time.sleep(0.2)
                continue
            one = Asked(time.time())
            try:
                one.said = self._ask()
            except httpx.HTTPError as error:
                one.said = type(error).__name__
            one.ended_s = time.time()
            self.asked.append(one)
            time.sleep(1.0)

    def _is_quiet(self) -> bool:
        """Whether nobody chats now: in spells, and not as long as something that was killed is not back."""
        return time.monotonic() % (CHATS_S + QUIET_S) > CHATS_S and all(kill.back_s for kill in self.kills)

    def _ask(self) -> str:
        """Ask for a streamed answer; return its status, or what was amiss with it."""
        body = {"model": self.model.name, "messages": [{"role": "user", "content": "How do I start?"}], "max_tokens": 8, "stream": True}
        with httpx.stream("POST", f"{self.stack.endpoint}/chat/completions", json=body, timeout=RECOVERS_WITHIN_S) as answer:
            text = answer.read().decode()
        return "cut" if answer.status_code == 200 and "[DONE]" not in text else str(answer.status_code)

    def kind_of(self, one: Asked) -> str:
        """Say what became of a request; what was in flight on an engine that was killed is cut, and no door is open without a head."""
        if one.said in ("200", "503"):
            return "answered" if one.is_answered else "refused"
        for kill in self.kills:
            if kill.stops_chat and one.sent_s <= kill.at_s + OUTLIVES_S and one.ended_s >= kill.at_s:
                return "cut"
            if kill.victim.startswith("head") and one.said == "ConnectError" and kill.at_s <= one.sent_s <= kill.back_s:
                return "no_door"
        return "failed"

    def took_s(self, kill: Kill, histories: dict[int, list[tuple[float, int]]]) -> float | None:
        """Return the seconds until chat answered and each job that it stopped was beyond where it was; else until it was there again.

        None where it is there for jobs alone, and stopped none: its job waited, or its card had none.
        """
        times = [one.ended_s for one in self.asked if one.is_answered and one.sent_s > kill.at_s][:1] if kill.stops_chat else []
        for job_id in kill.running if kill.stops_training else ():
            times += _went_on_s(kill, histories[job_id])
        if not times and kill.stops_training:
            return None
        return max(times, default=kill.whole_s or kill.back_s) - kill.at_s


def _went_on_s(kill: Kill, history: list[tuple[float, int]]) -> list[float]:
    """Return when a run that stopped at a kill was beyond where it was, if it stopped: steps are told before a worker ends, too."""
    told = sorted(history)
    for (last_s, _), (next_s, _) in pairwise(told):
        if kill.at_s - STOPS_S <= last_s <= kill.at_s + OUTLIVES_S and next_s - last_s >= STOPS_S and next_s > kill.at_s:
            highest = max(step for at_s, step in told if at_s <= last_s)
            return [at_s for at_s, step in told if at_s > last_s and step > highest][:1]
    return []


def settle(chaos: Chaos, forever: int) -> None:
    """See whether everything comes to its end: the short jobs, the lasting one, chat, and a last job that takes all train cards."""
    stack = chaos.stack
    rest(chaos, "a short job", forever)
    if stack.run("cluster", "cancel", str(forever)).returncode:
        chaos.lost.append("the job that lasts had ended")
    num_train = sum(card["pool"] == "train" for card in json.loads((stack.home / "cluster.json").read_text())["cards"])
    wide = chaos.submit(f"train.num_workers={num_train}", f"train.batch_size={4 * num_train}", "train.max_steps=8", "name=wide")
    rest(chaos, "the last job")
    if stack.ask(chaos.model.name).status_code != 200:
        chaos.lost.append("chat does not answer at the end")
    chaos.lost += [f"job {job.id} failed: {job.reason}" for job in chaos.jobs(FAILED)]
    chaos.lost += [f"job {wide} is not done"] if wide not in [job.id for job in chaos.jobs(DONE)] else []


def rest(chaos: Chaos, what: str, *staying: int) -> None:
    """Wait until no other job stands in line than these."""
    try:
        wait_for(lambda: {job.id for job in chaos.jobs(*STANDING)} <= set(staying), timeout_s=RECOVERS_WITHIN_S)
    except AssertionError:
        reasons = "; ".join(f"job {job.id} {job.state}: {job.reason}" for job in chaos.jobs(*STANDING))
        chaos.lost.append(f"{what} came to no end: {reasons}")


def figures_of(chaos: Chaos) -> dict[str, float]:
    """Return the result's figures."""
    histories = {job.id: loss_history(chaos.stack.registry.client, job.run_id) for job in chaos.jobs()}
    kinds = Counter(map(chaos.kind_of, chaos.asked))
    again = [number for history in histories.values() for number in steps_lost(history)]
    chaos.lost += [f"a run went back by {number} steps" for number in again if number > SAVE_EVERY]
    chaos.lost += [f"a request at {one.sent_s:.1f}: {one.said}" for one in chaos.asked if chaos.kind_of(one) == "failed"]
    figures: dict[str, float] = {"kills": len(chaos.kills)}
    for victim in VICTIMS:
        took_s = [chaos.took_s(kill, histories) for kill in chaos.kills if kill.victim == victim]
        name = victim.lower().replace("'s", "").replace(" ", "_")
        figures |= {f"{name}_kills": len(took_s)} if took_s else {}
        if times := [one for one in took_s if one is not None]:
            figures |= {f"{name}_timed": len(times), f"{name}_median_s": median(times), f"{name}_max_s": max(times)}
    figures |= {f"requests_{kind}": kinds[kind] for kind in ("answered", "refused", "cut", "no_door", "failed")}
    with closing(Queue(chaos.stack.home / "queue.db")) as queue:
        figures["lent"] = sum("is lent by chat" in reason for *_, reason in queue.handovers(10_000))
    figures |= {"jobs_done": len(chaos.jobs(DONE)), "jobs_failed": len(chaos.jobs(FAILED))}
    figures |= {"steps_done": sum(len({step for _, step in history}) for history in histories.values())}
    return figures | {"steps_lost": sum(again), "steps_lost_at_once_max": max(again, default=0), "num_lost": len(chaos.lost)}


def main() -> int:
    """Kill, write the result, and return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--note", default="", help="what is to be said beside the result, such as what else ran on the machine")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tandem-chaos-"))
    stack = Stack(folder / "home", folder, {name: free_port() for name in PORTS})
    cards = [] if find_gpus() else ["cards=[{pool: serve}, {pool: train}, {pool: train}]"]
    machine = [f"{name}={port}" for name, port in stack.ports.items() if name != "chat"]
    lending = f"lending={{enabled: true, quiet_after_s: {QUIET_AFTER_S}, idle_engine: sleep, min_hold_s: 0, max_attempts: {FOREVER}}}"
    done = stack.run("cluster", "up", "auto", *cards, *machine, lending)
    if done.returncode:
        raise SystemExit(done.stderr)
    try:
        model = make_tiny_model(folder / "tiny-model")
        config = make_config(folder, model, stack.ports["chat"])
        stack.serve(config, "serve.scaling.min_replicas=1", "serve.scaling.use_train_cards=false")
        chaos = Chaos(stack, config, model, random.Random(arguments.seed))
        forever = chaos.submit(f"train.max_steps={FOREVER}", "name=forever")
        wait_for(lambda: all(job.num_steps for job in chaos.jobs(*STANDING)))
        chaos.run(arguments.minutes * 60)
        settle(chaos, forever)
        figures = {"minutes": arguments.minutes, **figures_of(chaos)}
    finally:
        stack.run("cluster", "down")
    for line in chaos.lost:
        console.print(f"lost: {line}", markup=False)
    notes = {"seed": arguments.seed, "checkpoint_every_steps": SAVE_EVERY, "clients": NUM_ASKING, "beside": arguments.note}
    write_result("lending-chaos", figures, notes)
    return 1 if chaos.lost else 0


if __name__ == "__main__":
    sys.exit(main())
