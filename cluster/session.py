"""What `up` started, and how to reach it.

Knows the session's file, the token and the dashboard's HTTP API. Does not start or end anything: `cluster.stack` does.
"""

import hmac
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError

from cluster.home import home_folder, log_folder, write_text
from cluster.placement import HEAD, as_lent
from cluster.processes import Process
from configs.errors import ClusterError
from configs.schema import LendingConfig, MachineConfig

ARBITER, GATE, MLFLOW, SAMPLER = "arbiter", "gate", "mlflow", "sampler"
BESIDE = (ARBITER, SAMPLER)  # parts that no other depends on
WAIT_EVERY_S = 1.0
LOGS_VARIABLE = "TANDEM_LOGS"  # how the settings of logs reach all that belongs to the cluster
RAY_NAMESPACE = "tandem"  # of the named actors that drivers, workers and replicas find each other by


@dataclass(frozen=True)
class Session:
    """What `up` started, and how to reach it; kept in `cluster.json` in the home folder."""

    processes: tuple[Process, ...]
    cards: tuple[dict[str, str], ...]
    ray_address: str
    dashboard_url: str
    mlflow_url: str
    machine: dict[str, Any] = field(default_factory=dict)
    """The settings that it was started with."""
    has_haproxy: bool = False
    """Whether HAProxy stands before the engines, and not Ray Serve's own proxy."""
    ready: bool = True
    """False until all of it answers; an `up` that is killed leaves it so."""
    head: str = ""
    """Where the head's gate is; empty on the head itself."""
    versions: dict[str, str] = field(default_factory=dict)
    """What it was started from, on the head; what lies on the disk may be newer."""

    @property
    def storage(self) -> str:
        """Folder or URL that every machine reaches; empty where there is none."""
        return str(self.machine.get("storage") or "")

    @property
    def machine_name(self) -> str:
        """This machine's name in the labels of its cards."""
        return str(self.machine.get("name") or "") if self.head else HEAD

    def has_mlflow(self) -> bool:
        """Whether MLflow is one of its processes, and not another server that the user named."""
        return any(process.name == MLFLOW for process in self.processes)

    @property
    def lending(self) -> LendingConfig:
        """Who may use a card, as its machine's config says."""
        return LendingConfig.model_validate(self.machine.get("lending", {}))

    @property
    def job_cards(self) -> tuple[dict[str, str], ...]:
        """Labels of its cards, as jobs get them."""
        idle_engine = self.lending.idle_engine
        return tuple(as_lent(card, idle_engine) for card in self.cards)

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
            LOGS_VARIABLE: json.dumps(self.machine.get("logs", {})),
            "PATH": python_bin + os.pathsep + os.environ.get("PATH", os.defpath),
        }

    def dashboard(self, timeout_s: float = 30) -> httpx.Client:
        """Return an HTTP client for the dashboard and job API, with the token."""
        headers = {"Authorization": f"Bearer {token_file().read_text().strip()}"}
        return httpx.Client(base_url=self.dashboard_url, headers=headers, timeout=timeout_s, trust_env=False)

    def missing(self) -> list[str]:
        """Return the names of processes that no longer run."""
        return [process.name for process in self.processes if not process.running()]

    def missing_parts(self) -> list[str]:
        """Return those without which the cluster is not whole: the arbiter is needed by the queue alone, the sampler by nobody."""
        return [name for name in self.missing() if name not in BESIDE]


STORED = TypeAdapter(Session)


def token_file() -> Path:
    """Return the file with the token that every process of the cluster must show."""
    return home_folder() / "ray_token"


def operator_key(token: Path | None = None) -> str | None:
    """Return the operator's key to the chat endpoint; None where there is no cluster's token.

    It is made from the token, which opens far more: whoever gets hold of the key learns nothing of the token.
    """
    made = _made_from_token(b"chat endpoint", token)
    return made and f"sk-tandem-{made}"


def machine_key() -> str | None:
    """Return the key that joined machines show at the head's gate, made from the token likewise."""
    return _made_from_token(b"machines")


def _made_from_token(purpose: bytes, token: Path | None = None) -> str | None:
    try:
        secret = (token or token_file()).read_bytes().strip()
    except OSError:
        return None
    return hmac.digest(secret, purpose, "sha256").hex() if secret else None


def read_session() -> Session | None:
    """Return the session that `up` left, running or not.

    Raises:
        ClusterError: Its file is spoilt.
    """
    file = home_folder() / "cluster.json"
    if not file.is_file():
        return None
    try:
        return STORED.validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ") if first else str(error)
        remedy = "python -m cluster down, which ends what `up` or `join` started all the same, and forgets it"
        raise ClusterError("the record of the cluster cannot be read", f"{file}: {found}", remedy) from None


def wait_for_session() -> Session:
    """Wait until what this process is a part of is up."""
    while (session := read_session()) is None or not session.ready:
        time.sleep(WAIT_EVERY_S)
    return session


def keep_session(session: Session) -> None:
    """Write the session beside and rename it into place."""
    write_text(home_folder() / "cluster.json", json.dumps(asdict(session), indent=2), mode=0o600)


def require_session(only_head: bool = True) -> Session:
    """Return the running session.

    Args:
        only_head: Whether what is to be done is done on the head alone, where the line of jobs, the keys and the data are.

    Raises:
        ClusterError: The cluster is not up, not yet or not whole, or this machine only joined it.
    """
    session = read_session()
    if session is None:
        raise ClusterError("the cluster is not up", f"no session in {home_folder()}", "python -m cluster up")
    again = f"python -m cluster join {session.head}" if session.head else "python -m cluster up"
    if not session.ready:
        why = f"`up` is still at work, or was ended before all of it answered; see {log_folder()}"
        raise ClusterError("the cluster is not ready", why, again)
    if missing := session.missing_parts():
        raise ClusterError(f"the cluster is not whole: {', '.join(missing)} ended", f"see {log_folder()}", again)
    if only_head:
        refuse_joined(session)
    return session


def refuse_joined(session: Session | None) -> None:
    """Refuse what is done on the head alone.

    Raises:
        ClusterError: This machine only joined the cluster.
    """
    if session and session.head:
        why = "this machine joined it, and has neither its line of jobs, nor its keys, nor its data"
        raise ClusterError("this is done on the cluster's head", why, f"the same command on {session.head.partition(':')[0]}")


def require_same(session: Session, machine: MachineConfig) -> None:
    """Refuse settings that a running cluster does not have, instead of ignoring them."""
    wanted = machine.model_dump(mode="json")
    differ = [
        f"  {key}={session.machine[key]} runs, {value} is asked for"
        for key, value in wanted.items()
        if session.machine.get(key, value) != value
    ]
    if differ:
        raise ClusterError("the cluster is up with other settings", "\n".join(differ), "python -m cluster down")


def write_exports(session: Session) -> None:
    """Write what Ray's own commands need in a shell."""
    # Not MLflow's address: the next `up` in that shell would take it for another server that the user chose.
    left_out = ("PATH", "MLFLOW_TRACKING_URI")
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in session.environment().items() if key not in left_out)
    write_text(home_folder() / "env", exports + f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n', mode=0o600)


def answers(url: str) -> bool:
    """Whether a service answers at all; one that asks for a token (401) is up."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code in (200, 401)
    except httpx.HTTPError:
        return False


def read_raylets(client: httpx.Client) -> list[dict[str, Any]]:
    """Ask the dashboard for all raylets, with their labels and state; dead ones too."""
    return [node["raylet"] for node in client.get("/nodes", params={"view": "summary"}).json()["data"]["summary"]]


def joined_cards(raylets: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], ...]:
    """Return the labels of the cards that machines brought which joined and are there, by machine and card."""
    return known_cards(raylet for raylet in raylets if is_alive(raylet) and is_joined(raylet))


def known_cards(raylets: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], ...]:
    """Return the labels of all cards of these raylets, each once; the head's first, then by machine."""
    labels = [raylet["labels"] for raylet in raylets if {"card", "machine"} <= raylet.get("labels", {}).keys()]
    own = {found["card"]: {key: value for key, value in found.items() if not key.startswith("ray.io/")} for found in labels}
    return tuple(sorted(own.values(), key=_place))


def with_joined(session: Session) -> Session:
    """Return the session with the cards of machines that joined, as far as the dashboard tells of them."""
    try:
        with session.dashboard() as client:
            joined = joined_cards(read_raylets(client))
    except (httpx.HTTPError, KeyError, ValueError, OSError):
        return session  # whoever needs the cluster now tells that it does not answer
    return replace(session, cards=(*session.cards, *joined))


def _place(labels: Mapping[str, str]) -> tuple[bool, str, str]:
    return labels["machine"] != HEAD, labels["machine"], labels["card"]


def is_joined(raylet: Mapping[str, Any]) -> bool:
    """Whether a raylet is that of a card on a machine that joined."""
    labels = raylet.get("labels", {})
    return "card" in labels and labels.get("machine", HEAD) != HEAD


def is_alive(raylet: Mapping[str, Any]) -> bool:
    """Whether the dashboard takes a raylet for alive; one that it does not list is not."""
    return raylet.get("state") == "ALIVE"
