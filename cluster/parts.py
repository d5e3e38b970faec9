"""The parts of a stack: the command, arguments and environment of each process on a machine, in the order of their start.

Knows what is started how. Does not start anything: `cluster.stack` does.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.cards import Card
from cluster.home import BYTES_PER_GIB, home_folder
from cluster.kuberay import head_arguments, pod_environment, raylet_arguments
from cluster.limits import memory_bytes, num_cpus
from cluster.placement import HEAD, SEAT
from cluster.processes import free_port, quiet_port
from cluster.session import ARBITER, GATE, MLFLOW, SAMPLER, Session
from configs.loader import ROOT
from configs.schema import Environment, MachineConfig, is_loopback

RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
BESIDE_COMMANDS = {ARBITER: [sys.executable, "-m", "cluster.arbitrate"], SAMPLER: [sys.executable, "-m", "cluster.sample"]}
LOOPBACK = "127.0.0.1"
Part = tuple[str, list[str], dict[str, str]]
"""Name, command and extra environment of a process."""


def parts_of(machine: MachineConfig, cards: list[Card], session: Session) -> Iterator[Part]:
    """Yield the parts of a head and its cards, in the order of their start."""
    if not Environment().mlflow_tracking_uri:
        yield MLFLOW, *mlflow_command(LOOPBACK, machine.mlflow_port)
    head = ["--head", "--port", str(machine.ray_port), "--dashboard-host", machine.listen_host]
    head += ["--dashboard-port", str(machine.dashboard_port), "--temp-dir", str(ray_folder()), *head_arguments()]
    name = head_name(cards)
    if name == HEAD:
        yield HEAD, [*RAY_START, *head, *_bare_arguments(machine)], {"CUDA_VISIBLE_DEVICES": ""}
    for card in cards:
        yield raylet_part(machine, card, head if card.name == name else ["--address", session.ray_address])
    yield ARBITER, BESIDE_COMMANDS[ARBITER], {}  # which samples this machine too
    if not is_loopback(machine.listen_host):
        target = "" if Environment().mlflow_tracking_uri else session.mlflow_url
        yield GATE, gate_command(machine.listen_host, machine.mlflow_port, target, "door"), {}


def head_name(cards: list[Card]) -> str:
    """Return which part is Ray's head: the first card, unless there is none, or cards have cores that nothing else is to compute on."""
    return HEAD if not cards or any(card.cores for card in cards) else cards[0].name


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


def raylet_part(machine: MachineConfig, card: Card, role: list[str]) -> Part:
    """Return a card's raylet."""
    # nvidia-smi counts by bus, CUDA by speed unless told: with two kinds of GPU the cards would swap.
    extra = {"CUDA_VISIBLE_DEVICES": card.gpu.index if card.gpu else "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return card.name, card.kept_to_cores([*RAY_START, *role, *_raylet_arguments(machine, card)]), extra


def _raylet_arguments(machine: MachineConfig, card: Card) -> list[str]:
    """Return the arguments that give a raylet its card and nothing else.

    One job or engine at a time owns the resource `card`; an engine that sleeps has the `seat` alone.
    """
    return [
        "--labels", ",".join(f"{key}={value}" for key, value in card.labels.items()),
        "--resources", json.dumps({"card": 1, SEAT: 1}),
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
        *raylet_arguments(),
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
        # A replica answers in the loop that its requests come in: no streamed token goes from one thread to another, and `serve.last_words`
        # may write to the connection.
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
