"""What the arbiter sees, for Prometheus: chat, cards and who has them, jobs, gates, disks; and where all metrics are found.

Knows Prometheus's text and its files of targets. Does not know how the arbiter decides.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cluster.arbiter import Sight
from cluster.decisions import read_decisions
from cluster.home import home_folder, log_folder, write_text
from cluster.job_queue import ITS_TURN, LEAVING, RUNNING, STANDING, WAITING, Queue, QueuedJob
from cluster.metrics import (
    CARD_BUSY,
    CARD_LENT,
    CARD_UP,
    DISK_FREE,
    DISK_SIZE,
    ENGINES_ANSWERING,
    ENGINES_WANTED,
    GATE_DECIDED,
    GATE_DECISIONS,
    HANDOVERS,
    JOB_LOSSES,
    JOB_WAITS,
    JOBS,
    LOOKED,
    Metric,
)
from cluster.rule import SERVE, SWEEP, TRAIN, Card

CHAT, OTHER = "chat", "other"
HOLDERS = (CHAT, TRAIN, SWEEP, OTHER)
RAYS = {"ray.json": "prom_metrics_service_discovery.json", "ray_boards": "session_latest/metrics/grafana/dashboards"}
LONGEST_LOOK_S = 30.0  # between two looks; what was longer was an outage, and nobody knows who had the cards in it
STALE_S = 60.0  # what was seen longer ago is shown no more: a card of which nobody knows is not up
Family = CounterMetricFamily | GaugeMetricFamily
Values = dict[tuple[str, ...], float]  # by labels, in the table's order


class Exporter(Collector):
    """Shows what was seen last; seconds are added up from look to look, and begin anew with the process, as counters may."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.folders = {"home": home_folder(), "logs": log_folder()}
        self.looked_s: float | None = None
        self.busy_s: Values = {}
        self.lent_s: Values = {}
        self.families: tuple[Family, ...] = ()

    def collect(self) -> Iterator[Family]:
        """Give the newest families, in whatever thread Prometheus asks; disks are looked at now, since a full one may end all else."""
        yield _family(LOOKED, {(): self.looked_s or 0.0})
        yield from _of_disks(self.folders)
        yield from self.families

    def note(self, seen: Sight, now_s: float) -> None:
        """Take what a look saw, and the line of jobs."""
        jobs, gates = self.queue.jobs(), tuple(_of_gates())
        elapsed_s = min(max(0.0, now_s - self.looked_s), LONGEST_LOOK_S) if self.looked_s is not None else 0.0
        self._add_up(seen.cards, jobs, elapsed_s)
        self.families = (*_of_chat(seen), *self._of_cards(seen.cards), *_of_jobs(jobs, now_s), *gates)
        self.looked_s = now_s

    def miss(self, now_s: float) -> None:
        """Forget what was seen, if that was long ago, since a look failed."""
        if self.looked_s is not None and now_s - self.looked_s > STALE_S:
            self.families = ()

    def _add_up(self, cards: Sequence[Card], jobs: Sequence[QueuedJob], elapsed_s: float) -> None:
        """Give the time since the last look to who has each card; a card that is no more, such as a pod's, is forgotten."""
        busy_s, lent_s = self.busy_s, self.lent_s
        self.busy_s, self.lent_s = {}, {}
        kind_of = {name: job.kind for job in jobs if job.state in (RUNNING, LEAVING) for name in job.cards}
        for card in cards:
            labels = card.name, card.pool
            holder = kind_of.get(card.name) or (CHAT if card.engine_since_s is not None else OTHER if card.is_foreign else "")
            for name in HOLDERS:
                self.busy_s[*labels, name] = busy_s.get((*labels, name), 0.0) + (elapsed_s if name == holder else 0.0)
            is_lent = bool(holder) and (holder == CHAT) != (card.pool == SERVE)
            self.lent_s[labels] = lent_s.get(labels, 0.0) + (elapsed_s if is_lent else 0.0)

    def _of_cards(self, cards: Sequence[Card]) -> Iterator[Family]:
        yield _family(CARD_UP, {(card.name, card.pool): float(card.is_alive) for card in cards})
        yield _family(CARD_BUSY, self.busy_s)
        yield _family(CARD_LENT, self.lent_s)
        counted = self.queue.count_handovers()  # of all that ever were
        names = {*(card.name for card in cards), CHAT}
        found = {labels: number for labels, number in counted.items() if labels[0] in names}
        yield _family(HANDOVERS, {(name, ITS_TURN): 0 for name in sorted(names)} | found)


def _of_chat(seen: Sight) -> Iterator[Family]:
    yield _family(ENGINES_WANTED, {(): 1 if seen.lost_chat else seen.chat.num_wanted})
    yield _family(ENGINES_ANSWERING, {(): seen.num_answering})


def _of_disks(folders: Mapping[str, Path]) -> Iterator[Family]:
    found = {}
    for name, folder in folders.items():
        with suppress(OSError):
            found[name,] = shutil.disk_usage(folder)
    yield _family(DISK_FREE, {labels: usage.free for labels, usage in found.items()})
    yield _family(DISK_SIZE, {labels: usage.total for labels, usage in found.items()})


def _of_jobs(jobs: Sequence[QueuedJob], now_s: float) -> Iterator[Family]:
    counted: Values = {(kind, state): 0.0 for kind in (TRAIN, SWEEP) for state in STANDING}
    yield _family(JOBS, counted | Counter((job.kind, job.state) for job in jobs))
    yield _family(JOB_WAITS, {(): max((now_s - job.since_s for job in jobs if job.state == WAITING), default=0.0)})
    yield _family(JOB_LOSSES, {(): sum(job.num_lost for job in jobs)})


def _of_gates() -> Iterator[Family]:
    decided = read_decisions()
    yield _family(GATE_DECISIONS, Counter((entry.chatbot, entry.decision) for entry in decided))
    yield _family(GATE_DECIDED, {(entry.chatbot, entry.decision): entry.at_s for entry in decided})


def _family(metric: Metric, values: Mapping[Any, float]) -> Family:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    return family


def serve_metrics(exporter: Exporter, host: str, port: int, ray_folder: Path) -> None:
    """Show the metrics at a port, any free one if it is 0, and leave in `monitoring` in the home folder what Prometheus and Grafana read.

    That is this address, and the ways to what Ray keeps in its own folder: its list of nodes, and its boards.
    """
    registry = CollectorRegistry()
    registry.register(exporter)
    server, _ = start_http_server(port, host, registry)
    folder = home_folder() / "monitoring"
    target = {"labels": {"job": "arbiter"}, "targets": [f"{host}:{server.server_port}"]}
    write_text(folder / "arbiter.json", json.dumps([target]))
    for name, place in RAYS.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(ray_folder / place)
