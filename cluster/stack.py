"""The stack on this machine: one raylet for each card, and MLflow; started and ended.

Knows the order of things, and how a process is kept alive. Does not know what runs on the cards.
"""

import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import psutil

from cluster.cards import Card, find_cards
from cluster.chat_wish import forget_wish
from cluster.haproxy import proxy_environment
from cluster.home import home_folder, log_folder, require_disk, write_text
from cluster.parts import BESIDE_COMMANDS, LOOPBACK, head_name, parts_of, ray_folder, stack_environment
from cluster.processes import Process, find_shells, port_owner, send_signal
from cluster.session import (
    BESIDE,
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
from cluster.versions import read_versions
from configs.errors import ClusterError, last_lines
from configs.loader import ROOT
from configs.schema import Environment, MachineConfig, is_loopback

# A shell begins each part again that was killed, after the rest of it was ended: what it knew is on disk, or the arbiter sees to it. What
# ends by itself within seconds, as on a taken port, is left alone, so that `up` can tell; what goes on ending is begun ever more slowly.
PART = "# a part of Tandem, begun again whenever it is killed"
KEEP = f"""{PART}
began=$(date +%s); "$@"; [ $? -lt 128 ] && [ $(($(date +%s) - began)) -lt 10 ] && exit 1
pause=1
while sleep $pause; do
    {shlex.quote(sys.executable)} -m cluster.processes $$
    began=$(date +%s); "$@"
    if [ $(($(date +%s) - began)) -ge 30 ]; then pause=1; elif [ $pause -lt 30 ]; then pause=$((pause * 2)); fi
done
"""
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
            return old if not old.missing() else restart_beside(old)
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
        proxy = proxy_environment(machine, ray_folder() / "proxy", len(cards))
        session = replace(_plan(machine, cards), has_haproxy=bool(proxy))
        shared = {**session.environment(), **stack_environment(machine), **proxy}
        try:
            for name, command, extra in parts_of(machine, cards, session):
                say(f"starting {name}")
                process = spawn(name, command, {**shared, **extra})
                session = replace(session, processes=(*session.processes, process))
                keep_session(session)  # at once: an `up` that is killed leaves what the next `up` or `down` ends
                if name == head_name(cards):
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


def restart_beside(session: Session) -> Session:
    """Start again what ended of the parts that no other depends on; a killed shell may have left one."""
    ended = [process for process in session.processes if process.name in BESIDE and not process.running()]
    for left in (member for process in ended for member in process.family()):
        send_signal(left, psutil.Process.kill)
    kept = [process for process in session.processes if process not in ended]
    environment = {**session.environment(), **stack_environment(MachineConfig.model_validate(session.machine))}
    started = [spawn(process.name, BESIDE_COMMANDS[process.name], environment) for process in ended]
    session = replace(session, processes=(*kept, *started))
    keep_session(session)
    return session


def stop() -> int:
    """End what `up` started, and nothing else; return the number of processes that were ended."""
    with session_lock():
        try:
            session = read_session()
        except ClusterError:  # its file is spoilt, and the processes say themselves whose they are
            session = Session(find_shells(PART), (), "", "", "")
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
        versions=read_versions(),
    )


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
    return started <= known_cards(session)


def known_cards(session: Session) -> set[str]:
    """Return the cards whose raylets the cluster has; none where its dashboard does not answer."""
    return {raylet.get("labels", {}).get("card", "") for raylet in alive_raylets(session)}


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
