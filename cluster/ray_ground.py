"""The arbiter's ground on a real cluster: cards, chat and jobs through the dashboard's HTTP API.

Knows Ray's and Serve's JSON. Does not import Ray, which would take seconds and memory; does not decide anything.
"""

import math
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.activity import Activity, read_activity, tell_to_sleep
from cluster.arbiter import LOST, Driver, Sight
from cluster.chat_wish import read_wish, wish_lock
from cluster.home import home_folder, write_text
from cluster.job_queue import QueuedJob
from cluster.limits import num_idle_cores
from cluster.machines import Raylets, remember, with_lost
from cluster.placement import CARDS_VARIABLE, OWN_CORES, as_lent
from cluster.rule import TRAIN, Card, Chat
from cluster.session import Session, is_alive, is_joined, known_cards
from cluster.turn import EARLY_VARIABLE
from configs.cli import JOB_VARIABLE
from configs.errors import ClusterError, last_lines

SERVE_API, JOBS_API = "/api/serve/applications/", "/api/jobs/"
APPLICATION = "chat"
MODULES = {"train": "train", "sweep": "tune"}
ALIVE = ("PENDING", "RUNNING")
OPEN = ("HEALTHY", "DRAINING")
ENTRYPOINT = "Running entrypoint for job"  # Ray's own first line of a job's log
USED_CARD = re.compile(r"^([0-9.]+)/[0-9.]+ card", re.MULTILINE)
STOP_AGAIN_S = 5.0
Bounds = tuple[int, int] | None


@dataclass(frozen=True)
class Engine:
    """A replica, as Serve tells of it, and as it tells of itself."""

    node_id: str
    pid: int
    since_s: float
    runs: bool
    can_sleep: bool
    activity: Activity


class RayGround:
    """A cluster that `up` started."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.client, self.idle_engine = session.dashboard(), session.lending.idle_engine
        self.stopped_s: dict[str, float] = {}
        self.engines: tuple[Engine, ...] = ()
        self.nodes: dict[str, str] = {}
        """Of each card its raylet, as last seen."""

    def look(self) -> Sight:
        """Look at cards, chat and drivers."""
        nodes = self._get("/nodes?view=summary")["data"]
        known = [node["raylet"] for node in nodes["summary"]]
        raylets = [raylet for raylet in known if is_alive(raylet)]
        remember(raylets)
        self.nodes = {raylet["labels"]["card"]: raylet["nodeId"] for raylet in raylets if "card" in raylet.get("labels", {})}
        cards = (*self.session.cards, *known_cards(raylet for raylet in with_lost(known) if is_joined(raylet)))
        served = self._get(SERVE_API)
        application = served.get("applications", {}).get(APPLICATION, {})
        joined = {raylet["nodeId"] for raylet in raylets if is_joined(raylet)}
        self.engines = _engines(application, joined)
        jobs = self._get(JOBS_API)
        drivers = {job["submission_id"]: _driver(job) for job in jobs if job.get("submission_id")}
        bounds = _bounds(application.get("deployed_app_config"))
        used = {node_id for node_id, told in (nodes.get("nodeLogicalResources") or {}).items() if _is_used(told)}
        lost_chat = not application and read_wish() is not None
        chat = _chat(application, self.engines, bounds)
        lent = [as_lent(card, self.idle_engine) for card in cards]
        num_answering = _num_answering(self.engines, served.get("proxies") or {})
        return Sight(_cards(lent, raylets, self.engines, used), chat, bounds, drivers, lost_chat, num_answering, _num_idle_cores(cards))

    def submit(self, job: QueuedJob) -> None:
        """Start a job's process; Ray takes a submission's name only once."""
        file = home_folder() / "queue" / f"{job.id}.yaml"
        write_text(file, job.config)
        module = MODULES[job.kind]
        again = ["--resume", job.run_id] if job.run_id else []
        command = shlex.join([sys.executable, "-m", module, str(file), *again])
        environment = {JOB_VARIABLE: str(job.id), "PYTHONUNBUFFERED": "1"}
        environment |= {CARDS_VARIABLE: ",".join(job.cards)} if job.cards else {EARLY_VARIABLE: job.submission}
        environment["BASE_MODEL_NAME"] = ""  # what was set when it was submitted is in its config
        body = {
            "submission_id": job.submission,
            "entrypoint": f"cd {shlex.quote(job.folder)} && exec {command}",
            "runtime_env": {"env_vars": environment},
            "metadata": {"tandem_job": str(job.id), "chatbot": job.chatbot},
        }
        answer = self.client.post(JOBS_API, json=body)
        if answer.is_error and "already exists" not in answer.text:
            raise ClusterError(f"Ray did not take job {job.id}", answer.text[-500:], "python -m cluster status")

    def stop(self, submission: str) -> None:
        """Ask a job's process to save and leave: Ray sends SIGTERM, and SIGKILL after `job_stop_wait_s`."""
        if time.monotonic() - self.stopped_s.get(submission, -math.inf) >= STOP_AGAIN_S:
            self.stopped_s[submission] = time.monotonic()
            self.client.post(f"{JOBS_API}{submission}/stop")

    def words(self, submission: str) -> str:
        """Return the last thing of note that a job said."""
        lines = [line for line in self._said(submission).splitlines() if line.strip() and ENTRYPOINT not in line]
        told = [line for line in lines if line.startswith(("error: ", "done "))]
        return (told or lines or ["it said nothing"])[-1][:300]

    def tail(self, submission: str) -> str:
        """Return the last lines that a job's process said."""
        return last_lines(self._said(submission))

    def _said(self, submission: str) -> str:
        try:
            return str(self._get(f"{JOBS_API}{submission}/logs").get("logs", ""))
        except (httpx.HTTPError, ValueError):
            return "its log cannot be had"

    def bound(self, fewest: int, most: int) -> None:
        """Set how many engines chat may have; it leaves at once where it may."""
        with wish_lock():
            wish = read_wish()
            if wish is None:
                return
            body = deepcopy(wish)
            growth = body["applications"][0]["deployments"][0]["autoscaling_config"]
            asleep = {"downscale_to_zero_delay_s": 0} if fewest < growth["min_replicas"] else {}
            growth.pop("initial_replicas", None)  # Serve would begin anew with so many, in the midst of a burst too
            growth.update(min_replicas=fewest, max_replicas=most, **asleep)
            answer = self.client.put(SERVE_API, json=body)
        if answer.is_error:
            raise ClusterError("Ray Serve refused the number of engines", answer.text[-500:], "python -m serve CONFIG")

    def send_to_sleep(self, card: str) -> bool:
        """Tell the engine on a card to give it back while it has no request; return whether it was not told yet."""
        able = (engine for engine in self.engines if engine.runs and engine.can_sleep and engine.node_id == self.nodes.get(card))
        engine = next(able, None)
        return engine is not None and tell_to_sleep(engine.pid)

    def restore_chat(self) -> None:
        """Deploy what was deployed last."""
        with wish_lock():
            if (wish := read_wish()) is None:
                return
            self.client.put(SERVE_API, json=wish).raise_for_status()

    def _get(self, path: str) -> Any:
        answer = self.client.get(path)
        answer.raise_for_status()
        return answer.json()


def _engines(application: dict[str, Any], joined: Set[str]) -> tuple[Engine, ...]:
    """Return the replicas that have a place; `joined` are nodes of other machines."""
    arguments = (application.get("deployed_app_config") or {}).get("args", {})
    replicas = [replica for entry in application.get("deployments", {}).values() for replica in entry.get("replicas", [])]
    return tuple(
        Engine(
            node_id=replica["node_id"],
            pid=replica.get("pid") or 0,  # there is none yet
            since_s=replica["start_time_s"],
            runs=replica["state"] == "RUNNING",
            can_sleep=bool(arguments.get("sleeps")),
            activity=read_activity(replica.get("pid") or 0, replica["node_id"] if replica["node_id"] in joined else ""),
        )
        for replica in replicas
        if replica.get("node_id")
    )


def _num_idle_cores(cards: Sequence[Mapping[str, str]]) -> float:
    """Return how many cores have nothing to do; none where cards have their own: what gets ready on a card then takes those of its chat."""
    return 0.0 if any(OWN_CORES in card for card in cards) else num_idle_cores()


def _num_answering(engines: Iterable[Engine], proxies: Mapping[str, Mapping[str, Any]]) -> int:
    """Count the engines that can answer now: a request reaches them by HAProxy or Serve's own proxy, and they have their card."""
    is_shut = bool(proxies) and not any(proxy.get("status") in OPEN for proxy in proxies.values())
    return 0 if is_shut else sum(engine.runs and engine.activity.has_card for engine in engines)


def _cards(known: Iterable[Mapping[str, str]], raylets: Raylets, engines: Iterable[Engine], used: Set[str]) -> tuple[Card, ...]:
    """Return the cards that are known, by their labels: of each whether its raylet is among those alive, and what has it."""
    card_of = {raylet["nodeId"]: raylet["labels"]["card"] for raylet in raylets if "card" in raylet.get("labels", {})}
    taken = {name for node_id, name in card_of.items() if node_id in used}
    placed = {card_of[engine.node_id]: engine for engine in engines if engine.node_id in card_of}
    since_s = {name: engine.since_s for name, engine in placed.items() if engine.activity.has_card}
    return tuple(
        Card(
            name=card["card"],
            pool=card["pool"],
            memory_gib=float(card["memory-gib"]),
            is_alive=card["card"] in card_of.values(),
            engine_since_s=since_s.get(card["card"]),
            is_seated=card["card"] in placed and placed[card["card"]].can_sleep,
            is_answering=card["card"] in placed and placed[card["card"]].runs,
            is_called=card["card"] in placed and placed[card["card"]].activity.state == "waiting",
            is_foreign=card["pool"] == TRAIN and card["card"] in taken and card["card"] not in since_s,
        )
        for card in known
    )


def _chat(application: dict[str, Any], engines: Iterable[Engine], bounds: Bounds) -> Chat:
    if not application or bounds is None:
        return Chat()
    wish = read_wish() or application["deployed_app_config"]
    fewest, most = _bounds(wish) or bounds
    target = max((entry.get("target_num_replicas", 0) for entry in application.get("deployments", {}).values()), default=1)
    running = [engine for engine in engines if engine.runs]
    target -= sum(engine.activity.state == "asleep" for engine in running)
    if running:
        quiet_s = min(engine.activity.quiet_s for engine in running)
    else:
        quiet_s = 0.0 if target or not application.get("deployments") else math.inf  # a request waits, or nobody asks
    uses_train_cards = bool(
        wish["applications"][0]["args"]["use_train_cards"] if "applications" in wish else wish["args"]["use_train_cards"]
    )
    return Chat(fewest, most, uses_train_cards, max(0, target), quiet_s)


def _bounds(config: dict[str, Any] | None) -> Bounds:
    """Return the fewest and most engines of what was, or is to be, deployed."""
    application = (config or {}).get("applications", [config])[0] or {}
    growth = next((entry.get("autoscaling_config") for entry in application.get("deployments", [])), None)
    return (growth["min_replicas"], growth["max_replicas"]) if growth else None


def _is_used(told: str) -> bool:
    """Whether a node's card is in use, by what Ray tells of its resources, such as `1.0/1.0 card`."""
    found = USED_CARD.search(told)
    return bool(found and float(found[1]))


def _driver(job: dict[str, Any]) -> Driver:
    if job["status"] in ALIVE:
        return Driver("alive")
    if job["status"] == "STOPPED":
        return Driver("stopped")
    status = 0 if job["status"] == "SUCCEEDED" else job.get("driver_exit_code")
    return Driver("ended", LOST if status is None else int(status))
