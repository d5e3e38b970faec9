"""One part of a cluster in the foreground, as a container runs it: the head, a machine with cards, or MLflow.

It ends with SIGTERM, or with an error when the part is not whole any more, so that whoever started it starts it again. Meanwhile it shows
this machine's streams of the log, for a container's log is the standard output of its first process. Knows `up` and `join`, which it waits
beside. Does not know containers.
"""

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cluster.home import home_folder
from cluster.join import head_gate, join
from cluster.kuberay import HEAD_ADDRESS
from cluster.log_view import showing_streams
from cluster.parts import mlflow_command
from cluster.session import Session, answers, read_session
from cluster.stack import end, known_cards, session_lock, start
from configs.errors import ClusterError
from configs.schema import MachineConfig

LOOK_EVERY_S = 10.0
LOST_AFTER_S = 300.0  # a head that was killed, or whose pod moved, is back before that
HEAD_WAIT_S = 600.0
Say = Callable[[str], None]


def own_host() -> str:
    """Return the address that this machine's own name has, as a container's does.

    Raises:
        ClusterError: It has none.
    """
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ClusterError("this machine's name has no address", str(error), "listen_host=ADDRESS") from None


def run_head(machine: MachineConfig, say: Say) -> None:
    """Start the head, with its cards if it has some, and stay until ended."""
    with _signals() as asked, showing_streams():
        session = start(machine, say)
        say(f"up: {session.dashboard_url}")
        _stay(session, asked)


def run_card(address: str | None, machine: MachineConfig, say: Say) -> None:
    """Bring this machine's cards into the head's cluster, once there is one, and stay until ended."""
    address = address or os.environ.get(HEAD_ADDRESS)
    if not address:
        raise ClusterError("no head is named", "", "python -m cluster run card HEAD_ADDRESS")
    gate = head_gate(address, machine.mlflow_port)
    with _signals() as asked, showing_streams():
        deadline = time.monotonic() + HEAD_WAIT_S
        while not answers(f"http://{gate}/") and time.monotonic() < deadline:
            say(f"waiting for the head at {gate}")
            if asked.wait(LOOK_EVERY_S / 5):
                return
        session = join(gate, machine, say)
        say(f"joined: {', '.join(card['card'] for card in session.cards)}")
        _stay(session, asked)


def run_mlflow(machine: MachineConfig) -> None:
    """Become MLflow's server, on what lies in the home folder."""
    lock = (home_folder() / "mlflow.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_SH)  # until it ends: nothing is restored under a server
    os.set_inheritable(lock.fileno(), True)
    command, environment = mlflow_command(machine.listen_host, machine.mlflow_port)
    os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606 (a list that we made)


def why_not_whole(session: Session | None) -> str:
    """Return what of this machine's part of the cluster is missing; empty where all of it runs and the cluster knows it."""
    if session is None or not session.ready:
        return "it is not up"
    if missing := session.missing_parts():
        return f"{', '.join(missing)} ended"
    known = known_cards(session)
    if not known:
        return f"nobody answers at {session.dashboard_url}"
    gone = [card["card"] for card in session.cards if card["card"] not in known]
    return f"the cluster does not know {', '.join(gone)}" if gone else ""


def _stay(session: Session, asked: threading.Event) -> None:
    """Wait until asked to end, and end what was started; chat that was deployed is remembered for the next start."""
    whole_s = time.monotonic()
    try:
        while not asked.wait(LOOK_EVERY_S):
            _reap()
            if not (why := why_not_whole(read_session())):
                whole_s = time.monotonic()
            elif session.missing_parts() or time.monotonic() - whole_s > LOST_AFTER_S:
                raise ClusterError(f"this machine's part of the cluster is not whole: {why}", "", "start it again")
    finally:
        with session_lock():
            end(session)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and SIGINT set: once to end in order, twice to end at once."""
    asked = threading.Event()

    def hear(number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reap() -> None:
    """Take leave of processes that ended and whose parents did before; a container's first process is all their parent."""
    if os.getpid() == 1:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
