"""How the machine is: use, memory, temperature and watts of host and cards, one line each in the log's stream `system`.

NVML tells of GPUs; a card without one is a share of the CPU, of which psutil tells what its processes take. Knows one machine. Does not
know what the cards are used for.
"""

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from cluster.cards import Card, find_cards
from cluster.home import BYTES_PER_GIB, home_folder
from cluster.join import own_cards
from cluster.logs import SYSTEM, Logger, streams
from cluster.processes import Process
from cluster.session import Session
from configs.errors import TandemError
from configs.schema import MachineConfig

MILLI = 1000

log = logging.getLogger("tandem.sampler")


class Sampler:
    """Looks at the machine from time to time."""

    def __init__(self, logger: Logger, cards: list[Card], processes: tuple[Process, ...], every_s: float) -> None:
        """Look from now on; `processes` are those that `up` started, each of which leads a session of its own."""
        self.logger, self.cards, self.every_s = logger.bind(host=platform.node()), cards, every_s
        self.looked_s = -every_s
        self._leaders = {process.pid: process.name for process in processes}
        self._gpus = {card.name: _open_gpu(card) for card in cards if card.gpu}
        self._members: dict[str, dict[int, psutil.Process]] = {}  # kept, since use is counted from one look to the next
        psutil.cpu_percent()

    def sample(self) -> None:
        """Log one line for the host and one for each card, unless it is too soon."""
        now_s = time.monotonic()
        if now_s - self.looked_s < self.every_s:
            return
        self.looked_s = now_s
        self.logger.info("host", **_host())
        if len(self._gpus) < len(self.cards):
            self._look_for_members()
        for card in self.cards:
            told = _of_gpu(self._gpus[card.name]) if card.gpu else self._of_share(card)
            self.logger.info("card", card=card.name, pool=card.pool, accelerator=card.accelerator, **told)

    def _look_for_members(self) -> None:
        """Find the processes of each card by their session, which is one quick question for each process of the machine."""
        found: dict[str, dict[int, psutil.Process]] = {card.name: {} for card in self.cards}
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):
                name = self._leaders.get(os.getsid(pid), "")
                if name in found:
                    found[name][pid] = self._members.get(name, {}).get(pid) or psutil.Process(pid)
        self._members = found

    def _of_share(self, card: Card) -> dict[str, Any]:
        """Return what a card's processes take of its cores and its memory; memory that they share counts for each."""
        percent, num_bytes = 0.0, 0
        for member in self._members.get(card.name, {}).values():
            with suppress(psutil.Error):
                percent += member.cpu_percent()
                num_bytes += member.memory_info().rss
        return {"use": round(percent / 100 / card.num_cpus, 3), "memory_used_gib": _gib(num_bytes), "memory_gib": round(card.memory_gib, 2)}


def sampler_of(session: Session) -> Sampler:
    """Return what looks at this machine, and says in each line which of the cluster's it is."""
    machine = MachineConfig.model_validate(session.machine)
    logger = streams().logger(SYSTEM).bind(machine=session.machine_name)
    return Sampler(logger, _cards_of(session, machine), session.processes, machine.logs.sample_every_s)


def _cards_of(session: Session, machine: MachineConfig) -> list[Card]:
    """Return the cards that are looked at; none where a GPU is gone: all else goes on without a look at them."""
    try:
        return own_cards(machine) if session.head else find_cards(machine)
    except TandemError as error:
        log.warning("cards are not looked at: %s", error)
        return []


def _host() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    found = {
        "use": round(psutil.cpu_percent() / 100, 3),
        "memory_used_gib": _gib(memory.total - memory.available),
        "memory_gib": _gib(memory.total),
        "disk_free_gib": _gib(shutil.disk_usage(home_folder()).free),
    }
    with suppress(OSError, AttributeError):  # not every system tells
        if degrees := [sensor.current for sensors in psutil.sensors_temperatures().values() for sensor in sensors if sensor.current]:
            found["temperature_c"] = max(degrees)
    return found


def _of_gpu(handle: Any) -> dict[str, Any]:
    """Return what NVML tells of a GPU; each by itself, since not every GPU tells everything, such as one that is a part of another."""
    if handle is None:
        return {}
    import pynvml

    asked: dict[str, Callable[[], float]] = {
        "use": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "memory_used_gib": lambda: _gib(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        "memory_gib": lambda: _gib(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        "temperature_c": lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / MILLI,
    }
    found = {}
    for name, ask in asked.items():
        with suppress(pynvml.NVMLError):
            found[name] = ask()
    return found


def _open_gpu(card: Card) -> Any:
    """Return NVML's handle of a card's GPU; None where it cannot be had."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(int(card.gpu.index if card.gpu else 0))
    except Exception:  # no package, no driver, no such GPU; the errors' own classes are in the package
        return None


def _gib(num_bytes: float) -> float:
    return round(num_bytes / BYTES_PER_GIB, 2)
