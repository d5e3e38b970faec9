"""The stack on this machine: one raylet for each card, and MLflow; started, looked at, ended.

Knows processes, ports and the token. Does not know what runs on the cards.
"""

import errno
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from cluster.cards import Card, find_cards
from cluster.home import BYTES_PER_GIB, home_folder, log_folder, require_disk, write_text
from configs.errors import ClusterError
from configs.loader import ROOT
from configs.schema import Environment, MachineConfig

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 5
LAST_LINES = 15


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


@dataclass(frozen=True)
class Session:
    """What `up` started, and how to reach it; kept in `cluster.json` in the home folder."""

    processes: tuple[Process, ...]
    cards: tuple[dict[str, str], ...]
    ray_address: str
    dashboard_url: str
    mlflow_url: str

    def environment(self) -> dict[str, str]:
        """Return what a process needs in its environment to belong to this session."""
        python_bin = str(Path(sys.executable).parent)
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file()),
            "RAY_ADDRESS": self.dashboard_url,
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "TANDEM_HOME": str(home_folder()),
            "LOG_DIR": str(log_folder()),
            "PATH": python_bin + os.pathsep + os.environ.get("PATH", os.defpath),
        }

    def dashboard(self, timeout_s: float = 30) -> httpx.Client:
        """Return an HTTP client for the dashboard and job API, with the token."""
        headers = {"Authorization": f"Bearer {token_file().read_text().strip()}"}
        return httpx.Client(base_url=self.dashboard_url, headers=headers, timeout=timeout_s, trust_env=False)

    def missing(self) -> list[str]:
        """Return the names of processes that no longer run."""
        return [process.name for process in self.processes if not process.running()]


def token_file() -> Path:
    """Return the file with the token that every process of the cluster must show."""
    return home_folder() / "ray_token"


def read_session() -> Session | None:
    """Return the session that `up` left, running or not."""
    file = home_folder() / "cluster.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    values["processes"] = tuple(Process(**process) for process in values["processes"])
    return Session(**{**values, "cards": tuple(values["cards"])})


def require_session() -> Session:
    """Return the running session.

    Raises:
        ClusterError: The cluster is not up, or part of it died.
    """
    session = read_session()
    if session is None:
        raise ClusterError("the cluster is not up", f"no session in {home_folder()}", "python -m cluster up")
    if missing := session.missing():
        raise ClusterError(f"the cluster is not whole: {', '.join(missing)} ended", f"see {log_folder()}", "python -m cluster up")
    return session


def start(machine: MachineConfig, say: Callable[[str], None]) -> Session:
    """Start what is not running yet, and return when all of it answers; idempotent.

    Raises:
        ClusterError: No room, a port is taken, or a process did not come up; what this call started is ended again.
    """
    with _lock():
        old = read_session()
        if old and not old.missing():
            return old
        if old:
            # A cluster without its head, or a card without its head, is of no use: begin afresh.
            say(f"{', '.join(old.missing())} ended since the last `up`; starting again")
            end(old)
        require_disk(machine.min_disk_free_gib)
        _require_free_ports(machine)
        if not token_file().is_file():
            write_text(token_file(), secrets.token_hex(32), mode=0o600)
        cards = find_cards(machine)
        session = _plan(machine, cards)
        started: list[Process] = []
        try:
            for name, command, extra in _commands(machine, cards, session):
                say(f"starting {name}")
                started.append(_spawn(name, command, {**session.environment(), **_stack_environment(machine), **extra}))
                if name == cards[0].name:
                    _wait(started, lambda: _answers(f"{session.dashboard_url}/api/version"), "Ray's dashboard")
            _wait(started, lambda: _num_nodes(session) == len(cards), "a raylet for each card")
            _wait(started, lambda: _answers(f"{session.mlflow_url}/health"), "MLflow")
        except BaseException:
            end(Session(tuple(started), (), "", "", ""))
            raise
        session = Session(tuple(started), session.cards, session.ray_address, session.dashboard_url, session.mlflow_url)
        write_text(home_folder() / "cluster.json", json.dumps(asdict(session), indent=2), mode=0o600)
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in session.environment().items() if key != "PATH")
        write_text(home_folder() / "env", exports + f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n', mode=0o600)
        return session


def stop() -> int:
    """End what `up` started, and nothing else; return the number of processes that were ended."""
    with _lock():
        session = read_session()
        return end(session) if session else 0


def end(session: Session) -> int:
    """End the processes of a session and all their children, and forget the session."""
    family: list[psutil.Process] = []
    for process in session.processes:
        if root := process.running():
            family += [*root.children(recursive=True), root]
    for member in reversed(family):
        _signal(member, psutil.Process.terminate)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for member in alive:
        _signal(member, psutil.Process.kill)
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    (home_folder() / "cluster.json").unlink(missing_ok=True)
    return len(family)


def _signal(process: psutil.Process, send: Callable[[psutil.Process], None]) -> None:
    try:
        send(process)
    except psutil.NoSuchProcess:
        return


@contextmanager
def _lock() -> Iterator[None]:
    """Let one `up` or `down` at a time touch the session."""
    import fcntl

    with (home_folder() / "cluster.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("another `up` or `down` is at work", f"it holds {stream.name}", "wait for it to end") from None
        yield


def _plan(machine: MachineConfig, cards: list[Card]) -> Session:
    mlflow_url = Environment().mlflow_tracking_uri or f"http://{machine.listen_host}:{machine.mlflow_port}"
    return Session(
        processes=(),
        cards=tuple(card.labels for card in cards),
        ray_address=f"{machine.listen_host}:{machine.ray_port}",
        dashboard_url=f"http://{machine.listen_host}:{machine.dashboard_port}",
        mlflow_url=mlflow_url,
    )


def _commands(machine: MachineConfig, cards: list[Card], session: Session) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield name, command and extra environment of each process, in the order of their start."""
    if not Environment().mlflow_tracking_uri:
        folder = home_folder() / "mlflow"
        folder.mkdir(exist_ok=True)
        server = ["server", "--host", machine.listen_host, "--port", str(machine.mlflow_port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
        yield "mlflow", [sys.executable, "-m", "mlflow", *server, *stores], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    head = ["--head", "--port", str(machine.ray_port), "--dashboard-host", machine.listen_host]
    head += ["--dashboard-port", str(machine.dashboard_port), "--temp-dir", str(ray_folder())]
    for number, card in enumerate(cards):
        role = head if number == 0 else ["--address", session.ray_address]
        extra = {"CUDA_VISIBLE_DEVICES": card.gpu.index if card.gpu else ""}
        yield card.name, [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *_raylet_arguments(machine, card)], extra


def _raylet_arguments(machine: MachineConfig, card: Card) -> list[str]:
    """Return the arguments that give a raylet its card and nothing else. One job at a time owns the resource `card`."""
    return [
        "--node-ip-address", machine.listen_host,
        "--labels", ",".join(f"{key}={value}" for key, value in card.labels.items()),
        "--resources", json.dumps({"card": 1}),
        "--num-cpus", str(card.num_cpus),
        "--num-gpus", "1" if card.gpu else "0",
        "--memory", str(int(card.memory_gib * BYTES_PER_GIB)) if not card.gpu else str(psutil.virtual_memory().total // 2),
        "--object-store-memory", str(int(machine.object_store_gib * BYTES_PER_GIB)),
        "--dashboard-agent-listen-port", str(_free_port()),
        "--ray-client-server-port", str(_free_port()),
        "--disable-usage-stats",
    ]  # fmt: skip


def ray_folder() -> Path:
    """Return where Ray keeps sockets and logs: in /tmp, since a socket's path may have only 107 letters."""
    from hashlib import sha256

    return Path(tempfile.gettempdir()) / f"tandem-{sha256(str(home_folder()).encode()).hexdigest()[:8]}"


def _stack_environment(machine: MachineConfig) -> dict[str, str]:
    """Return what jobs and replicas inherit from their raylet."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TANDEM_CHECKOUT": str(ROOT),
        "RAY_JOB_STOP_WAIT_TIME_S": str(machine.job_stop_wait_s),
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_DISABLE_DASHBOARD_LOG_INFO": "1",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",  # Ray's default starves its workers beside anything else on a small machine
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def _spawn(name: str, command: list[str], extra: Mapping[str, str]) -> Process:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # Without an address of its own a head starts a cluster; with one it would look for it.
    environment.update({key: value for key, value in extra.items() if key != "RAY_ADDRESS"})
    with (log_folder() / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
    return Process(name, child.pid, psutil.Process(child.pid).create_time())


def _wait(started: list[Process], ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        dead = [process.name for process in started if not process.running()]
        if dead or time.monotonic() > deadline:
            name = dead[0] if dead else started[-1].name
            problem = f"{name} ended while starting" if dead else f"{what} did not answer within {START_TIMEOUT_S} s"
            log = log_folder() / f"{name}.log"
            lines = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise ClusterError(problem, f"last lines of {log}:\n{lines}", "python -m cluster doctor")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    """Whether a service answers at all; one that asks for a token (401) is up."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code in (200, 401)
    except httpx.HTTPError:
        return False


def _num_nodes(session: Session) -> int:
    try:
        with session.dashboard(timeout_s=5) as client:
            summary = client.get("/nodes", params={"view": "summary"}).json()["data"]["summary"]
    except (httpx.HTTPError, KeyError, ValueError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


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


def _require_free_ports(machine: MachineConfig) -> None:
    ports = {"ray_port": machine.ray_port, "dashboard_port": machine.dashboard_port}
    if not Environment().mlflow_tracking_uri:
        ports["mlflow_port"] = machine.mlflow_port
    taken = {name: (port, owner) for name, port in ports.items() if (owner := port_owner(machine.listen_host, port))}
    if taken:
        problems = "\n".join(f"  port {port} ({name}) is held by {owner}" for name, (port, owner) in taken.items())
        name, (port, _) = next(iter(taken.items()))
        raise ClusterError(
            "a port is taken", problems, f"end that process, or choose another port: python -m cluster up auto {name}={port + 1}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
