"""Processes and ports of this machine: whose they are, and whether they still live.

Knows psutil. Does not know what the processes do.
"""

import errno
import os
import random
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from cluster.home import home_folder
from configs.errors import ClusterError

QUIET_PORTS = range(20_000, 30_000)  # Ray's workers take ports below, Serve's replicas and the system those above


@dataclass(frozen=True)
class Process:
    """One process that `up` started; the time of its start tells it from a later one with the same number."""

    name: str
    pid: int
    started_s: float

    def running(self) -> psutil.Process | None:
        """Return the process if it still runs."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started_s) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None

    def family(self) -> list[psutil.Process]:
        """Return the process and all its children, those too that lost a parent in between; where it was killed, what it left behind."""
        if root := self.running():
            children = root.children(recursive=True)
            known = {root.pid, *(child.pid for child in children)}
            return [*(process for process in self._session_members() if process.pid not in known), *children, root]
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
                return []  # another process has its number
        left = self._session_members()
        # The kernel gives a number to nobody while its session has members, so one of ours proves the rest, which may have
        # written their title over their environment. Without one the number was another's meanwhile, say before a restart.
        return left if any(_is_ours(process, self.started_s) for process in left) else []

    def _session_members(self) -> list[psutil.Process]:
        """Return what else belongs to the session that the process leads."""
        return [process for process in psutil.process_iter() if process.pid != self.pid and _session_id(process) == self.pid]


def _session_id(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_ours(process: psutil.Process, started_s: float) -> bool:
    try:
        return process.create_time() > started_s - 1 and process.environ().get("TANDEM_HOME") == str(home_folder())
    except psutil.Error:
        return False


def find_shells(first_line: str) -> tuple[Process, ...]:
    """Return the shells of this home folder whose script begins so, each by the name that it was given: for when the record is lost."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if words[1:2] != ["-c"] or not words[2].startswith(first_line):
                continue
            leads = _session_id(process) == process.pid  # a shell forks, and its fork looks like itself
            if leads and process.environ().get("TANDEM_HOME") == str(home_folder()):
                found.append(Process(words[3], process.pid, process.create_time()))
    return tuple(found)


def send_signal(process: psutil.Process, send: Callable[[psutil.Process], None]) -> None:
    """Send a signal to a process, which may have ended meanwhile."""
    try:
        send(process)
    except psutil.NoSuchProcess:
        return


def port_owner(host: str, port: int) -> str | None:
    """Return who listens on a port, as `name (pid)`; None where it is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                remedy = "an address of this machine, such as 127.0.0.1"
                raise ClusterError(f"cannot listen on {host}, port {port}", str(error), remedy) from None
        else:
            return None
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
            return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another process"


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_port() -> int:
    """Return a free port for something that listens later: none of those that the system or Ray hand out meanwhile."""
    for port in random.sample(QUIET_PORTS, len(QUIET_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ClusterError("no port is free", f"all from {QUIET_PORTS[0]} to {QUIET_PORTS[-1]} are taken", "python -m cluster doctor")


def main() -> None:
    """End what a killed part left in the session that this process belongs to; its leader, the argument, stays."""
    leader = int(sys.argv[1])
    mine = {os.getpid(), leader, *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        if process.pid not in mine and _session_id(process) == leader:
            send_signal(process, psutil.Process.kill)


if __name__ == "__main__":
    main()
