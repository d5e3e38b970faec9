"""What engines tell of themselves: when each last had a request, and whether it has its card; and how one is told to sleep.

Each engine keeps a small file, and looks for another beside it. Knows files of this machine. Does not know what a request is. The file
is written when the first request comes and when the last one ends: while there are many, none waits for a disk.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from cluster.home import home_folder

EngineState = Literal["unknown", "waiting", "awake", "asleep"]
"""`waiting` wants a card that it has not, be it new or called from sleep; `unknown` is one that never sleeps, or has told nothing yet."""
BEDTIME = ".sleep"


@dataclass(frozen=True)
class Activity:
    """How an engine stands."""

    quiet_s: float = 0.0
    """For how long it has had no request; 0 while it has some, and where nothing is known of it."""
    state: EngineState = "unknown"

    @property
    def has_card(self) -> bool:
        """Whether the engine's card is its own; one that has told nothing yet may have it."""
        return self.state in ("awake", "unknown")


class ActivityFile:
    """What one engine's process tells of itself."""

    def __init__(self) -> None:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if not psutil.pid_exists(int(file.stem)):
                file.unlink(missing_ok=True)
        self.num_in_flight, self.since_s = 0, time.time()
        self.state: EngineState = "unknown"
        self.bedtime = _bedtime(os.getpid())
        self.bedtime.unlink(missing_ok=True)  # of an engine that had this number before
        self.descriptor = os.open(folder / str(os.getpid()), os.O_RDWR | os.O_CREAT, 0o600)
        self._write()

    def open(self) -> None:
        """Note that requests can come from now on: until then nobody could be quiet."""
        self.since_s = time.time()
        self._write()

    def begin(self) -> None:
        """Note that a request came."""
        self.num_in_flight += 1
        if self.num_in_flight == 1:
            self._write()

    def end(self) -> None:
        """Note that a request was answered, or went away."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self.since_s = time.time()
            self._write()

    def tell(self, state: EngineState) -> None:
        """Note how the engine stands, which is no request."""
        self.state = state
        self._write()

    def is_told_to_sleep(self) -> bool:
        """Whether the engine is to give its card back; it is told once."""
        if not self.bedtime.exists():
            return False
        self.bedtime.unlink(missing_ok=True)
        return True

    def _write(self) -> None:
        os.pwrite(self.descriptor, f"{self.num_in_flight:<8d}{self.since_s:<20.3f}{self.state:<8}".encode(), 0)


def note_quiet(node_id: str, pid: int, quiet_s: float) -> None:
    """Note for an engine on another machine for how long it has had no request."""
    file = _folder(node_id) / str(pid)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"0 {time.time() - quiet_s:.3f} unknown")


def read_activity(pid: int, node_id: str = "") -> Activity:
    """Return how an engine stands, of another machine's by its node."""
    try:
        num_in_flight, since_s, state = (_folder(node_id) / str(pid)).read_text().split()
        quiet_s = 0.0 if int(num_in_flight) > 0 else max(0.0, time.time() - float(since_s))
    except (OSError, ValueError):
        return Activity()
    return Activity(quiet_s, state)  # type: ignore[arg-type]


def tell_to_sleep(pid: int) -> bool:
    """Tell an engine of this machine to give its card back while it has no request; return whether it was not told before."""
    file = _bedtime(pid)
    if file.exists():
        return False
    file.touch()
    return True


def _bedtime(pid: int) -> Path:
    return _folder() / f"{pid}{BEDTIME}"


def _folder(node_id: str = "") -> Path:
    return home_folder() / ("activity_elsewhere" if node_id else "activity") / node_id
