"""When engines last had a request: each keeps a small file, which says so by its time and by what is in it.

Knows files of this machine. Does not know what a request is. Writing takes microseconds, so that it is done at each request.
"""

import os
import time
from pathlib import Path

import psutil

from cluster.home import home_folder


class ActivityFile:
    """What one engine's process tells of itself."""

    def __init__(self) -> None:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if not psutil.pid_exists(int(file.name)):
                file.unlink(missing_ok=True)
        self.num_in_flight = 0
        self.descriptor = os.open(folder / str(os.getpid()), os.O_RDWR | os.O_CREAT, 0o600)
        self._write()

    def begin(self) -> None:
        """Note that a request came."""
        self.num_in_flight += 1
        self._write()

    def end(self) -> None:
        """Note that a request was answered, or went away."""
        self.num_in_flight -= 1
        self._write()

    def _write(self) -> None:
        os.pwrite(self.descriptor, f"{self.num_in_flight:<12d}".encode(), 0)


def note_quiet(node_id: str, pid: int, quiet_s: float) -> None:
    """Note for an engine on another machine for how long it has had no request."""
    file, now_s = _folder(node_id) / str(pid), time.time()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("0")
    os.utime(file, (now_s, now_s - quiet_s))


def read_quiet_s(pid: int, node_id: str = "") -> float:
    """Return for how long an engine has had no request, of another machine's by its node; 0 where nothing is known of it."""
    file = _folder(node_id) / str(pid)
    try:
        is_busy = int(file.read_text() or 1) > 0
        changed_s = file.stat().st_mtime
    except (OSError, ValueError):
        return 0.0
    return 0.0 if is_busy else max(0.0, time.time() - changed_s)


def _folder(node_id: str = "") -> Path:
    return home_folder() / ("activity_elsewhere" if node_id else "activity") / node_id
