"""A machine that joins the cluster of another, the head: a raylet for each of its cards, and the way to the head's MLflow.

Knows what a joined machine has of its own: cards, home folder, logs. Does not know what runs on its cards; commands are given on the head.
"""

import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from cluster.cards import Card, find_cards
from cluster.gate import INTRODUCTION
from cluster.home import log_folder, require_disk
from cluster.kuberay import lasting
from cluster.parts import BESIDE_COMMANDS, LOOPBACK, Part, gate_command, raylet_part, stack_environment
from cluster.placement import HEAD
from cluster.processes import port_owner
from cluster.session import (
    GATE,
    SAMPLER,
    Session,
    answers,
    keep_session,
    machine_key,
    read_session,
    require_same,
    token_file,
)
from cluster.stack import alive_raylets, bring_token, end, known_cards, made_ready, restart_beside, session_lock, spawn, wait_until
from cluster.storage import reaches
from cluster.versions import read_versions, require_alike
from configs.errors import ClusterError
from configs.schema import Environment, MachineConfig, is_loopback

Introduction = Mapping[str, Any]
ASK_TIMEOUT_S = 15.0


def join(head: str, machine: MachineConfig, say: Callable[[str], None]) -> Session:
    """Start this machine's raylets in the head's cluster, and return when all are there; idempotent.

    Args:
        head: Address of the head, `HOST` or `HOST:PORT` with its `mlflow_port`.
        machine: This machine's cards, and its own address as the others reach it.
        say: Told of each step, in words.

    Raises:
        ClusterError: The head does not answer, knows another token, runs other code, or has a machine of this name already.
    """
    with session_lock():
        old = read_session()
        if old and not old.head:
            raise ClusterError("this machine is the head of a cluster", f"at {old.ray_address}", "python -m cluster down, then join again")
        if old and old.ready and old.head == head and not old.missing_parts():
            require_same(old, machine.model_copy(update={"name": machine.name or old.machine_name, "storage": old.storage or None}))
            require_alike(ask_head(head)["versions"], read_versions())
            _require_known(old)
            return old if not old.missing() else restart_beside(old)
        if old:
            say("the last `join` has ended, or did not finish; starting again")
            end(old)
        require_disk(machine.min_disk_free_gib)
        bring_token()
        told = ask_head(head)
        require_alike(told["versions"], read_versions())
        machine = machine.model_copy(update={"name": machine.name or host_name(), "storage": told["storage"] or None})
        cards = own_cards(machine)
        session = _plan(head, machine, cards, told)
        _require_room_for(session, cards, told)
        return _start(session, machine, cards, told, say)


def _require_known(session: Session) -> None:
    """Refuse to call joined what the cluster does not know: cards come back by themselves, unless their log says why not."""
    known = known_cards(session)
    if gone := [card["card"] for card in session.cards if card["card"] not in known]:
        why = f"they are begun again each half minute; {log_folder() / gone[0]}.log tells what keeps them out"
        raise ClusterError(f"the cluster does not have {', '.join(gone)} now", why, "python -m cluster leave, then join again")


def ask_head(head: str) -> Introduction:
    """Ask the head's gate what a machine must know.

    Raises:
        ClusterError: It does not answer, knows another token, or its cluster is not up yet.
    """
    address = f"http://{head}"
    try:
        answer = httpx.get(
            address + INTRODUCTION, headers={"Authorization": f"Bearer {machine_key()}"}, timeout=ASK_TIMEOUT_S, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = f"{error}; it listens only where `up` was given an address of its network"
        raise ClusterError(f"no head answers at {address}", why, "on the head: python -m cluster up auto listen_host=ITS_ADDRESS") from None
    if answer.status_code == 401:
        remedy = "TANDEM_TOKEN, or a copy of the head's file"
        raise ClusterError("the head knows another token", f"this machine's lies in {token_file()}", remedy)
    try:
        told: Introduction = answer.json()
        is_ready = told["ready"]
    except (ValueError, KeyError, TypeError):
        raise ClusterError(f"{address} is no head", f"it answers with status {answer.status_code}", "the address that `up` tells") from None
    if not is_ready:
        raise ClusterError("the head is not up yet", "it is still starting", "try again when its `up` has ended")
    return told


def own_address(head: str) -> str:
    """Return the address from which this machine reaches the head, so that the head reaches it there too."""
    host = urlsplit(f"//{head}").hostname or head
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(f"no way to {host}", str(error), "the head's address, as `python -m cluster up` told it there") from None


def host_name() -> str:
    """Return this machine's name as Ray's labels and the names of cards may have it."""
    return "-".join(re.findall("[a-z0-9]+", platform.node().partition(".")[0].lower()))[-40:].strip("-") or "machine"


def own_cards(machine: MachineConfig) -> list[Card]:
    """Return this machine's cards, each with its name in front."""
    name = machine.name or host_name()
    return [replace(card, name=f"{name}-{card.name}", machine=name) for card in find_cards(machine)]


def _plan(head: str, machine: MachineConfig, cards: list[Card], told: Introduction) -> Session:
    mlflow_url = Environment().mlflow_tracking_uri if told["mlflow_url"] is None else told["mlflow_url"]
    if not mlflow_url:
        raise ClusterError("the head's MLflow is elsewhere", "it was started with MLFLOW_TRACKING_URI", "set the same on this machine")
    return Session(
        processes=(),
        cards=tuple(card.labels for card in cards),
        ray_address=lasting(told["ray_address"]),
        dashboard_url=f"http://{lasting(told['dashboard_url'].removeprefix('http://'))}",
        mlflow_url=mlflow_url,
        machine=machine.model_dump(mode="json"),
        has_haproxy=told["has_haproxy"],
        ready=False,
        head=head,
    )


def _require_room_for(session: Session, cards: list[Card], told: Introduction) -> None:
    """Refuse a machine that others could not reach, whose name is taken, or whose cards could not train."""
    host, name = str(session.machine["listen_host"]), session.machine_name
    if is_loopback(host):
        raise ClusterError(f"listen_host={host} is no address at which the head reaches this machine", "", "listen_host=ADDRESS of its own")
    others = [raylet for raylet in alive_raylets(session) if raylet.get("labels", {}).get("machine") == name]
    if name == HEAD or any(raylet.get("nodeManagerAddress") != host for raylet in others):
        why = "the names of cards begin with it, and each is there once"
        raise ClusterError(f"there is a machine named {name} already", why, f"python -m cluster join {session.head} auto name=ANOTHER")
    if told["mlflow_url"] and (owner := port_owner(LOOPBACK, _port(session.mlflow_url))):
        why = f"it is held by {owner}, and here MLflow is to be reached at {session.mlflow_url}, as on the head"
        raise ClusterError("a port is taken", why, "end that process, or `up` on the head with another mlflow_port")
    trains = told["lends"] or any(card.pool == "train" for card in cards)
    if trains and not session.storage:
        why = "the head has no folder that this machine reaches, and a run on its cards could not save"
        remedy = "storage=FOLDER_OR_URL at `up` on the head, or only serve cards here: 'cards=[{pool: serve}]'"
        raise ClusterError("this machine's cards could not train", why, remedy)
    if trains and not reaches(session.storage):
        why = "the head left a mark there, which is not seen from here"
        raise ClusterError(f"this machine does not reach {session.storage}", why, "mount it here at the same place")


def _start(session: Session, machine: MachineConfig, cards: list[Card], told: Introduction, say: Callable[[str], None]) -> Session:
    before = {raylet["nodeId"] for raylet in alive_raylets(session)}  # those of a machine that was lost are thought alive for a while
    haproxy = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"} if session.has_haproxy else {}
    shared = {**session.environment(), **stack_environment(machine), **haproxy}

    def has_joined(joining: Session) -> bool:
        started = {process.name for process in joining.processes} & {card.name for card in cards}
        return started <= {raylet.get("labels", {}).get("card") for raylet in alive_raylets(joining) if raylet["nodeId"] not in before}

    try:
        for name, command, extra in joined_parts(session, machine, cards, told):
            say(f"starting {name}")
            session = replace(session, processes=(*session.processes, spawn(name, command, {**shared, **extra})))
            keep_session(session)
            wait_until(session, has_joined, f"the raylet of {name}")
        wait_until(session, lambda up: answers(f"{up.mlflow_url}/health"), "MLflow", GATE)
        return made_ready(session)
    except BaseException:
        end(session)
        raise


def joined_parts(session: Session, machine: MachineConfig, cards: list[Card], told: Introduction) -> Iterator[Part]:
    """Yield the parts of a machine that joins, in the order of their start."""
    if told["mlflow_url"]:
        yield GATE, gate_command(LOOPBACK, _port(session.mlflow_url), f"http://{session.head}", "window"), {}
    for card in cards:
        name, command, extra = raylet_part(machine, card, ["--address", session.ray_address])
        yield name, [sys.executable, "-m", "cluster.rejoin", session.head, *command], extra
    yield SAMPLER, BESIDE_COMMANDS[SAMPLER], {}


def _port(url: str) -> int:
    return urlsplit(url).port or 80


def head_gate(address: str, usual_port: int | None = None) -> str:
    """Return where the head's gate is, for the address that the user gave; without a port it is MLflow's usual one, or another."""
    try:
        parts = urlsplit(f"//{address}")
        port = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError:  # of a port, of an address in brackets, and of a name that no network has
        parts, port, host = urlsplit(""), None, b""
    if not host or parts.path or Path(address).suffix == ".yaml":
        raise ClusterError(f"{address} is no address", "", "python -m cluster join HOST, or HOST:PORT with the head's mlflow_port")
    return f"{address}:{usual_port or MachineConfig().mlflow_port}" if port is None else address
