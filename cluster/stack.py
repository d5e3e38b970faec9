"""The stack on this machine: one raylet for each card, and MLflow; started and ended.

Knows what is started how. Does not know what runs on the cards.
"""

import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.cards import Card, find_cards
from cluster.chat_wish import forget_wish
from cluster.haproxy import proxy_environment
from cluster.home import BYTES_PER_GIB, home_folder, log_folder, require_disk, write_text
from cluster.kuberay import head_arguments, pod_environment
from cluster.limits import memory_bytes, num_cpus
from cluster.placement import HEAD
from cluster.processes import Process, find_shells, free_port, port_owner, quiet_port, send_signal
from cluster.session import (
    ARBITER,
    GATE,
    MLFLOW,
    Session,
    answers,
    is_alive,
    keep_session,
    read_raylets,
    read_session,
    require_same,
    token_file,
    write_exports,
)
from configs.errors import ClusterError, last_lines
from configs.loader import ROOT
from configs.schema import Environment, MachineConfig, is_loopback

# A shell begins each part again that was killed, after the rest of it was ended: what it knew is on disk, or the arbiter sees to it. What
# ends by itself within seconds, as on a taken port, is left alone, so that `up` can tell; what goes on ending is begun ever more slowly.
KEEP = """
began=$(date +%s); "$@"; [ $? -lt 128 ] && [ $(($(date +%s) - began)) -lt 10 ] && exit 1
pause=1
while sleep $pause; do
    PYTHON -m cluster.processes $$
    began=$(date +%s); "$@"
    if [ $(($(date +%s) - began)) -ge 30 ]; then pause=1; elif [ $pause -lt 30 ]; then pause=$((pause * 2)); fi
done
""".replace("PYTHON", shlex.quote(sys.executable))
RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
LOOPBACK = "127.0.0.1"
ARBITER_COMMAND = [sys.executable, "-m", "cluster.arbitrate"]
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 5
MIN_TOKEN_LETTERS = 32


def start(machine: MachineConfig, say: Callable[[str], None], named: str | None = None) -> Session:
    """Start what is not running yet, and return when all of it answers; idempotent.

    Args:
        machine: The cards, and where to listen.
        say: Told of each step, in words.
        named: How the user named the machine; without it a cluster that is up will do, whatever its settings.

    Raises:
        ClusterError: No room, a port is taken, a process did not come up, or a cluster with other settings is up.
    """
    with session_lock():
        old = read_session()
        if old and old.head:
            raise ClusterError(f"this machine joined the cluster of {old.head}", "", "python -m cluster leave, then up again")
        if old and old.ready and not old.missing_parts():
            if named:
                require_same(old, machine)
            return old if not old.missing() else _restart_arbiter(old)
        if old:
            # A cluster without its head, or a card without its head, is of no use: begin afresh.
            missing = ", ".join(old.missing_parts())
            say(f"{missing} ended since the last `up`; starting again" if missing else "the last `up` did not finish; starting again")
            end(old)
        require_disk(machine.min_disk_free_gib)
        _require_free_ports(machine, named or "auto")
        bring_token(make=True)
        if machine.storage:
            from cluster.storage import mark

            mark(machine.storage)
        cards = find_cards(machine)
        proxy = proxy_environment(machine, ray_folder() / "proxy")
        session = replace(_plan(machine, cards), has_haproxy=bool(proxy))
        shared = {**session.environment(), **stack_environment(machine), **proxy}
        try:
            for name, command, extra in _commands(machine, cards, session):
                say(f"starting {name}")
                process = spawn(name, command, {**shared, **extra})
                session = replace(session, processes=(*session.processes, process))
                keep_session(session)  # at once: an `up` that is killed leaves what the next `up` or `down` ends
                if name == (cards[0].name if cards else HEAD):
                    wait_until(session, lambda up: answers(f"{up.dashboard_url}/api/version"), "Ray's dashboard")
                # One after the other: two that start at once may choose the same socket, and one of them dies.
                wait_until(session, _has_its_raylets, f"the raylet of {name}")
            wait_until(session, lambda up: answers(f"{up.mlflow_url}/health"), "MLflow", MLFLOW)
            if not is_loopback(machine.listen_host):
                gate = f"http://{machine.listen_host}:{machine.mlflow_port}"
                wait_until(session, lambda _: answers(gate), "the gate for other machines", GATE)
            return made_ready(session)
        except BaseException:
            end(session)
            raise


def _restart_arbiter(session: Session) -> Session:
    """Start the arbiter again, which nothing else depends on; a killed shell may have left one."""
    for process in session.processes:
        for left in process.family() if process.name == ARBITER else ():
            send_signal(left, psutil.Process.kill)
    kept = tuple(process for process in session.processes if process.name != ARBITER)
    environment = {**session.environment(), **stack_environment(MachineConfig.model_validate(session.machine))}
    session = replace(session, processes=(*kept, spawn(ARBITER, ARBITER_COMMAND, environment)))
    keep_session(session)
    return session


def stop() -> int:
    """End what `up` started, and nothing else; return the number of processes that were ended."""
    with session_lock():
        try:
            session = read_session()
        except ClusterError:  # its file is spoilt, and the processes say themselves whose they are
            session = Session(find_shells(KEEP), (), "", "", "")
        forget_wish()
        return end(session) if session else 0


def end(session: Session) -> int:
    """End the processes of a session and all their children, and forget the session."""
    shells = [shell for process in session.processes if (shell := process.running())]
    for shell in shells:
        send_signal(shell, psutil.Process.suspend)  # or it would begin again what is ended here
    family = [member for process in session.processes for member in process.family()]
    for member in reversed(family):
        send_signal(member, psutil.Process.terminate)
    for shell in shells:
        send_signal(shell, psutil.Process.resume)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for member in alive:
        send_signal(member, psutil.Process.kill)
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    (home_folder() / "cluster.json").unlink(missing_ok=True)
    return len(family)


@contextmanager
def session_lock() -> Iterator[None]:
    """Let one `up`, `down` or `restore` at a time touch the session."""
    import fcntl

    with (home_folder() / "cluster.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("another `up`, `down` or `restore` is at work", f"it holds {stream.name}", "wait for it to end") from None
        yield


def _plan(machine: MachineConfig, cards: list[Card]) -> Session:
    mlflow_url = Environment().mlflow_tracking_uri or f"http://{LOOPBACK}:{machine.mlflow_port}"
    return Session(
        processes=(),
        cards=tuple(card.labels for card in cards),
        ray_address=f"{machine.listen_host}:{machine.ray_port}",
        dashboard_url=f"http://{machine.listen_host}:{machine.dashboard_port}",
        mlflow_url=mlflow_url,
        machine=machine.model_dump(mode="json"),
        ready=False,
    )


def _commands(machine: MachineConfig, cards: list[Card], session: Session) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield name, command and extra environment of each process, in the order of their start."""
    if not Environment().mlflow_tracking_uri:
        yield MLFLOW, *mlflow_command(LOOPBACK, machine.mlflow_port)
    head = ["--head", "--port", str(machine.ray_port), "--dashboard-host", machine.listen_host]
    head += ["--dashboard-port", str(machine.dashboard_port), "--temp-dir", str(ray_folder()), *head_arguments()]
    if not cards:
        yield HEAD, [*RAY_START, *head, *_bare_arguments(machine)], {"CUDA_VISIBLE_DEVICES": ""}
    for number, card in enumerate(cards):
        yield raylet_part(machine, card, head if number == 0 else ["--address", session.ray_address])
    yield ARBITER, ARBITER_COMMAND, {}
    if not is_loopback(machine.listen_host):
        target = "" if Environment().mlflow_tracking_uri else session.mlflow_url
        yield GATE, gate_command(machine.listen_host, machine.mlflow_port, target, "door"), {}


def mlflow_command(host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command of MLflow on this home folder, and its environment; artifacts are named by paths inside that folder alone."""
    folder = home_folder() / "mlflow"
    folder.mkdir(exist_ok=True)
    server = ["server", "--host", host, "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    return [sys.executable, "-m", "mlflow", *server, *stores], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def gate_command(host: str, port: int, target: str, end: str) -> list[str]:
    """Return the command of one end of the way from joined machines to MLflow."""
    return [sys.executable, "-m", "cluster.gate", host, str(port), target, end]


def raylet_part(machine: MachineConfig, card: Card, role: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Return name, command and extra environment of a card's raylet."""
    # nvidia-smi counts by bus, CUDA by speed unless told: with two kinds of GPU the cards would swap.
    extra = {"CUDA_VISIBLE_DEVICES": card.gpu.index if card.gpu else "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return card.name, [*RAY_START, *role, *_raylet_arguments(machine, card)], extra


def _raylet_arguments(machine: MachineConfig, card: Card) -> list[str]:
    """Return the arguments that give a raylet its card and nothing else. One job at a time owns the resource `card`."""
    return [
        "--labels", ",".join(f"{key}={value}" for key, value in card.labels.items()),
        "--resources", json.dumps({"card": 1}),
        "--num-cpus", str(card.num_cpus),
        "--num-gpus", "1" if card.gpu else "0",
        "--memory", str(int(card.memory_gib * BYTES_PER_GIB)) if not card.gpu else str(memory_bytes() // 2),
        *_common_arguments(machine),
    ]  # fmt: skip


def _bare_arguments(machine: MachineConfig) -> list[str]:
    """Return the arguments of a head without a card: drivers and Ray's own actors run there."""
    return ["--labels", f"machine={HEAD}", "--num-cpus", str(num_cpus()), "--num-gpus", "0", *_common_arguments(machine)]


def _common_arguments(machine: MachineConfig) -> list[str]:
    return [
        "--node-ip-address", machine.listen_host,
        "--object-store-memory", str(int(machine.object_store_gib * BYTES_PER_GIB)),
        "--dashboard-agent-listen-port", str(free_port()),
        "--ray-client-server-port", str(free_port()),
        "--include-log-monitor", "false",  # it sends workers' logs to drivers, and ours want none (log_to_driver=False)
        "--disable-usage-stats",
    ]  # fmt: skip


def ray_folder() -> Path:
    """Return where Ray keeps sockets and logs: in /tmp, since a socket's path may have only 107 letters."""
    from hashlib import sha256

    return Path(tempfile.gettempdir()) / f"tandem-{sha256(str(home_folder()).encode()).hexdigest()[:8]}"


def stack_environment(machine: MachineConfig) -> dict[str, str]:
    """Return what jobs and replicas inherit from their raylet."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TANDEM_CHECKOUT": str(ROOT),
        "RAY_JOB_STOP_WAIT_TIME_S": str(machine.job_stop_wait_s),
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_DISABLE_DASHBOARD_LOG_INFO": "1",
        "RAY_prestart_worker_first_driver": "0",
        **_idle_environment(),
        **_interface_environment(machine.listen_host),
        # Ray's own are the same for every cluster of a machine: the second would show the first one's metrics.
        **{name: str(quiet_port()) for name in ("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")},
        # A replica answers in the loop that its requests come in: no streamed token goes from one thread to another.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # What Serve's own proxy is wrapped in; a replica asks for it too, and is told otherwise by `serve.app`.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
        "RAY_worker_niceness": "0",  # Ray's default starves its workers beside anything else on a small machine
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **pod_environment(),
    }


def _interface_environment(host: str) -> dict[str, str]:
    """Return by which interface workers of one run talk: else they take that of the host's name, which is loopback on many a machine."""
    if is_loopback(host):
        return {}
    addresses = psutil.net_if_addrs().items()
    interface = next((name for name, found in addresses if any(entry.address.partition("%")[0] == host for entry in found)), None)
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}


def _idle_environment() -> dict[str, str]:
    """Return what lets a cluster without work leave the cores alone: Ray's defaults are meant for large machines that are busy."""
    return {
        # Serve's controller looks for what is to be done; replicas answer without it. At 0.1 s it takes 3 % of a core.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # Each card's agent reads CPU, memory and GPU of every process, and the dashboard its own, for its pages and Prometheus.
        "REPORTER_UPDATE_INTERVAL_MS": "15000",
        "METRICS_RECORD_INTERVAL_S": "30",
        # Every process sends its counters to its card's agent, which keeps them for Prometheus.
        "RAY_metrics_report_interval_ms": "30000",
        # A card whose head was killed waits no longer for it than the new one takes to come.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        # Agents look whether their raylet lives: five times in vain, and they end. `down` does not wait for that.
        "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "1",
    }


def spawn(name: str, command: list[str], extra: Mapping[str, str]) -> Process:
    """Start a part under a shell that begins it again whenever it is killed; it writes to a log of its name."""
    # Nor with the token: each part reads it from its file, and what a part runs has no need of it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "TANDEM_TOKEN"}
    # Without an address of its own a head starts a cluster; with one it would look for it.
    environment.update({key: value for key, value in extra.items() if key != "RAY_ADDRESS"})
    with (log_folder() / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", KEEP, name, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    return Process(name, child.pid, psutil.Process(child.pid).create_time())


def made_ready(session: Session) -> Session:
    """Keep a session as one all of whose parts answer, and what Ray's own commands need to reach it."""
    write_exports(session)
    session = replace(session, ready=True)
    keep_session(session)
    return session


def wait_until(session: Session, ready: Callable[[Session], bool], what: str, part: str | None = None) -> None:
    """Wait until what was started last, or another part, is ready.

    Raises:
        ClusterError: Something ended meanwhile, or it took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready(session):
        dead = session.missing()
        if dead or time.monotonic() > deadline:
            name = dead[0] if dead else part or session.processes[-1].name
            problem = f"{name} ended while starting" if dead else f"{what} did not answer within {START_TIMEOUT_S} s"
            log = log_folder() / f"{name}.log"
            said = last_lines(log.read_text(errors="replace")) if log.exists() else ""
            raise ClusterError(problem, f"last lines of {log}:\n{said}", "python -m cluster doctor")
        time.sleep(0.2)


def _has_its_raylets(session: Session) -> bool:
    """Whether each card that was started so far has its raylet in the cluster."""
    started = {process.name for process in session.processes} & {card["card"] for card in session.cards}
    return started <= {raylet.get("labels", {}).get("card") for raylet in alive_raylets(session)}


def alive_raylets(session: Session) -> list[dict[str, Any]]:
    """Return the raylets that are alive; none where the dashboard does not answer."""
    try:
        with session.dashboard(timeout_s=5) as client:
            return [raylet for raylet in read_raylets(client) if is_alive(raylet)]
    except (httpx.HTTPError, KeyError, ValueError):
        return []


def bring_token(make: bool = False) -> None:
    """See to it that the cluster's token lies in this home folder: TANDEM_TOKEN, or that of before, or a new one.

    Raises:
        ClusterError: There is none, and none is to be made.
    """
    if given := Environment().tandem_token:
        token = given.get_secret_value().strip()
        if len(token) < MIN_TOKEN_LETTERS or not token.isascii():
            why = f"it opens everything, and has {len(token)} letters; {MIN_TOKEN_LETTERS} or more plain ones are wanted"
            raise ClusterError("TANDEM_TOKEN is no good token", why, "openssl rand -hex 32 makes one")
        write_text(token_file(), token, mode=0o600)
    elif not token_file().is_file():
        if not make:
            why = f"neither TANDEM_TOKEN in the environment or in .env, nor {token_file()}"
            raise ClusterError("this machine does not have the cluster's token", why, f"copy the head's {token_file().name} there")
        write_text(token_file(), secrets.token_hex(32), mode=0o600)


def _require_free_ports(machine: MachineConfig, named: str = "auto") -> None:
    host = machine.listen_host
    ports = [("ray_port", host, machine.ray_port), ("dashboard_port", host, machine.dashboard_port)]
    if not Environment().mlflow_tracking_uri:
        ports.append(("mlflow_port", LOOPBACK, machine.mlflow_port))
    if not is_loopback(host):
        ports.append(("mlflow_port", host, machine.mlflow_port))
    taken = {name: (port, owner) for name, host, port in ports if (owner := port_owner(host, port))}
    if taken:
        problems = "\n".join(f"  port {port} ({name}) is held by {owner}" for name, (port, owner) in taken.items())
        name, (port, _) = next(iter(taken.items()))
        again = f"python -m cluster up {shlex.quote(named)} {name}={port + 1}"
        raise ClusterError("a port is taken", problems, f"end that process, or choose another port: {again}")
