"""Two hosts on one machine: each with a network, a process table, a name and a home folder of its own, joined by a cable (a veth pair).

Needs root's rights, `ip`, `unshare` and `nsenter`. What a host does not have of its own is the rest of the disk, where the code is.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from configs.loader import ROOT

SOCKET, CABLE = "socket0", "cable0"  # a bridge keeps a host's address when nothing is plugged in
NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid"]
TOOLS = ("ip", "unshare", "nsenter")


def why_no_hosts() -> str:
    """Return why this machine cannot have such hosts; empty where it can."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{' and '.join(missing)} missing (Debian's iproute2 and util-linux)"
    tried = subprocess.run(
        [
            "unshare",
            *NAMESPACES,
            "--fork",
            "--mount-proc",
            "sh",
            "-c",
            f"ip link add {CABLE} type veth && ip link add {SOCKET} type bridge",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Host:
    """One host; `start` after `lose` is a machine that was switched off and on: only its files are left."""

    name: str
    address: str
    home: Path
    hidden: tuple[Path, ...]
    """Folders of other hosts, which this one does not see."""
    environment: dict[str, str]
    init: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """The number of its first process."""
        assert self.init
        [child] = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        return int(child)

    def start(self) -> None:
        """Switch it on; it has no cable yet."""
        hide = " && ".join(f"mkdir -p {folder} && mount -t tmpfs none {folder}" for folder in self.hidden)
        network = f"ip link set lo up && ip link add {SOCKET} type bridge && ip address add {self.address}/24 dev {SOCKET}"
        network += f" && ip link set {SOCKET} up"
        script = f"hostname {self.name} && {hide} && {network} && echo up && trap '' CHLD && exec sleep infinity"
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        self.init = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.init.stdout
        assert self.init.stdout.readline() == b"up\n"

    def lose(self) -> None:
        """Switch it off: all its processes are killed at once, and its network with them."""
        if self.init:
            with suppress(ProcessLookupError):
                os.kill(self.pid, 9)
            self.init.wait()
            self.init = None

    def command(self, *words: str) -> list[str]:
        """Return what runs a command on this host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, f"--wdns={ROOT}", *words]

    def run(self, *words: str, timeout_s: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m WORDS` there."""
        return subprocess.run(
            self.command(sys.executable, "-m", *words),
            env={**self.environment, "TANDEM_HOME": str(self.home), "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def plug(first: Host, second: Host) -> None:
    """Lay a cable between two hosts that are on; what is left of an earlier one goes."""
    for host in (first, second):
        subprocess.run(host.command("ip", "link", "delete", CABLE), capture_output=True, check=False)
    ends = [(CABLE, "netns", str(host.pid)) for host in (first, second)]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
    for host in (first, second):
        subprocess.run(host.command("ip", "link", "set", CABLE, "master", SOCKET, "up"), check=True)


@contextmanager
def switched_on(hosts: Sequence[Host]) -> Iterator[None]:
    """Switch on two hosts with a cable between them, and off afterwards."""
    try:
        for host in hosts:
            host.start()
        plug(hosts[0], hosts[1])
        yield
    finally:
        for host in hosts:
            host.lose()
