"""The services of compose.yaml without a container engine: each with processes, mounts, a name and an address of its own, as user 10001.

Needs root's rights, `unshare`, `nsenter` and `setpriv`. Folders stand for volumes; this checkout and its environment for the image.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from configs.loader import ROOT
from tests.helpers.hosts import why_no_hosts
from tests.ray.stack import wait_for

DOCKER = ROOT / "cluster" / "deploy" / "docker"
USER_ID = 10001
NAMESPACES = ["--mount", "--uts", "--ipc", "--pid"]
HIDDEN = ("/opt", "/var/lib", "/var/log", "/var/cache", "/run", "/tmp")
SET_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def why_no_containers() -> str:
    """Return why this machine cannot stand in for a container engine; empty where it can."""
    if not shutil.which("setpriv"):
        return "setpriv missing (Debian's util-linux)"
    tried = subprocess.run([*_as_user({}), sys.executable, "-c", ""], capture_output=True, text=True, check=False)
    return why_no_hosts() or (f"no other user may run this Python: {tried.stderr.strip()}" if tried.returncode else "")


def read_services() -> dict[str, dict[str, Any]]:
    """Return the services of compose.yaml with the defaults of its variables."""
    text = SET_DEFAULT.sub(r"\1", (DOCKER / "compose.yaml").read_text())
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return services


def image_environment() -> dict[str, str]:
    """Return what the Dockerfile sets for everything that runs in its images."""
    block = re.search(r"^ENV PATH=.*?[^\\]$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    return dict(re.findall(r"(\w+)=(\S+)", block[0]))


@dataclass
class Network:
    """A network of names, all on this machine, with no way out."""

    folder: Path
    addresses: dict[str, str]
    holder: subprocess.Popen[bytes]

    @property
    def hosts(self) -> Path:
        """What each container's /etc/hosts says."""
        return self.folder / "hosts"


@contextmanager
def network(folder: Path, names: list[str]) -> Iterator[Network]:
    """Lay a network, and take it away afterwards."""
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
    links = " && ".join(["ip link set lo up", *(f"ip address add {address}/32 dev lo" for address in addresses.values())])
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", f"{links} && echo up && exec sleep infinity"], stdout=subprocess.PIPE)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        yield Network(folder, addresses, holder)
    finally:
        holder.kill()
        holder.wait()


@dataclass
class Container:
    """One service that runs."""

    name: str
    service: dict[str, Any]
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    @property
    def pid(self) -> int:
        """The number of its first process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(wait_for(children.read_text, timeout_s=10))

    def run(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as `docker compose exec` does."""
        inside = ["nsenter", "--target", str(self.pid), "--net", *NAMESPACES, "--wdns=/opt/tandem"]
        return subprocess.run(
            [*inside, *_as_user(self.environment), *words], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def is_healthy(self) -> bool:
        """Whether its health check says so."""
        kind, *words = self.service["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(*words).returncode == 0

    def stop(self) -> int:
        """End it as `docker compose stop` does, and return its exit status."""
        os.kill(self.pid, 15)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """End it and all that runs in it at once, as a machine that is lost does."""
        kill(self.process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a container's first process, with which the kernel ends the others; `unshare --kill-child` forgets it when it becomes a user."""
    with suppress(psutil.NoSuchProcess):
        for first in psutil.Process(process.pid).children():
            first.kill()
    process.kill()
    process.wait()


@contextmanager
def container(net: Network, name: str, service: dict[str, Any], secrets: Path) -> Iterator[Container]:
    """Start a service by its own command, and kill what is left of it afterwards."""
    volumes = dict(volume.split(":")[:2] for volume in service["volumes"])
    mounts = {"/opt/tandem": ROOT, "/opt/venv": Path(sys.prefix), "/etc/hosts": net.hosts}
    mounts |= {target: net.folder / source for source, target in volumes.items()}
    mounts |= {f"/run/secrets/{secret}": secrets / secret for secret in service.get("secrets", [])}
    for source in volumes:
        (net.folder / source).mkdir(exist_ok=True)
        os.chown(net.folder / source, USER_ID, USER_ID)
    set_here = {name: value for name, value in service.get("environment", {}).items() if value}
    path = f"/opt/venv/bin{os.pathsep}{os.environ['PATH']}"
    environment = {**image_environment(), **set_here, "PATH": path, "HOME": "/tmp", "USER": "tandem", "COLUMNS": "200"}
    command = [*_as_user(environment), "python", "-m", *service["command"]]
    script = f"hostname {name} && {_mount(mounts)} && cd /opt/tandem && exec {shlex.join(command)}"
    inside = ["nsenter", "--target", str(net.holder.pid), "--net", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    with (net.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*inside, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Container(name, service, process, environment)
    finally:
        kill(process)


def _as_user(environment: dict[str, str]) -> list[str]:
    """Return what goes before a command: no root, no rights, and no other environment."""
    nobody = ["setpriv", "--reuid", str(USER_ID), "--regid", str(USER_ID), "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return [*nobody, "env", "-i", *(f"{name}={value}" for name, value in environment.items())]


def _mount(mounts: dict[str, Path]) -> str:
    """Return shell words that lay out a container's disk; through /mnt, since what is hidden may hold what is mounted."""
    steps = ["mount -t tmpfs none /mnt"]
    for number, source in enumerate(mounts.values()):
        make = f"mkdir /mnt/{number}" if source.is_dir() else f"touch /mnt/{number}"
        steps += [make, f"mount --bind {shlex.quote(str(source))} /mnt/{number}"]
    steps += [f"mount -t tmpfs -o mode=1777 none {folder}" for folder in HIDDEN]
    for number, (target, source) in enumerate(mounts.items()):
        make = f"mkdir -p {target}" if source.is_dir() else f"mkdir -p {Path(target).parent} && touch {target}"
        steps += [make, f"mount --bind /mnt/{number} {target}"]
    return " && ".join(steps)
