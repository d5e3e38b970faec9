"""What a run and a sweep have in common: what is checked and made ready first, the way to the cluster, and the record of how it ended.

Knows the order of things before and after training. Does not know Ray Train or Ray Tune.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cluster.home import require_disk
from cluster.job_queue import note_run
from cluster.models import check_model, ensure_model, model_fingerprint
from cluster.placement import is_usable
from cluster.plan import require_precision
from cluster.registry import Registry, mlflow_errors
from cluster.session import LOGS_VARIABLE, RAY_NAMESPACE, Session, require_session, with_joined
from cluster.turn import is_early, likely_card, wait_for_turn
from configs.cli import JOB_VARIABLE
from configs.errors import ClusterError, RegistryError, RunError
from configs.schema import ChatbotConfig, MachineConfig
from data.copies import send_data
from data.prepare import Prepared, check_source, prepare
from train.record import FAILED, FINISHED, RUN, STOPPED, Record
from train.sizing import Sizing, require_room

if TYPE_CHECKING:
    from train.standby import Standby
    from train.worker import Task

ASKED = "the job was asked to stop"
SLOW_IMPORTS = ("mlflow.tracking", "torch", "train.controller", "train.worker")
Say = Callable[[str], None]
Handler = Callable[[int, FrameType | None], None]


@dataclass(frozen=True)
class Start:
    """All that is known before anything trains."""

    session: Session
    registry: Registry
    config: ChatbotConfig
    """With `resume` the one that the run began with."""
    folder: Path
    """Of the base model."""
    data: Prepared
    base_fingerprint: str
    kind: str = RUN
    earlier: Record | None = None
    """What is gone on with."""


def make_ready(config: ChatbotConfig, say: Say, kind: str = RUN, resume: str | None = None) -> Start:
    """Check a config against this machine, and fetch its base and data.

    Raises:
        TandemError: What the user can mend; nothing was begun.
    """
    session = with_joined(require_session())
    require_disk(session.machine.get("min_disk_free_gib", MachineConfig().min_disk_free_gib))
    registry = Registry(session.mlflow_url)
    earlier: Record | None = None
    if resume:
        earlier, config = Record.find(registry.client, resume, kind)
        say(f"going on with {kind} {resume}")
    check_source(config.data)
    check_model(config.model)
    require_precision(config, filter(is_usable, session.cards))
    if kind == RUN:  # a sweep's trials may each change what decides it
        require_room(config, session.job_cards)
    say(f"base model {config.model.name}")
    folder = ensure_model(config.model)
    data = prepare(config, folder)
    say(f"data {data.fingerprint}: {data.num_train} conversations to train on, {data.num_heldout} held out{data.left_out}")
    if warning := data.too_long(config.data.max_length_tokens):
        say(f"[yellow]warning[/] {warning}")
    base_fingerprint = model_fingerprint(folder)
    if earlier:
        earlier.require_same(data, base_fingerprint)
    return Start(session, registry, config, folder, data, base_fingerprint, kind, earlier)


def make_task(start: Start, config: ChatbotConfig, run_id: str, sizing: Sizing | None) -> "Task":
    """Return what workers need to know of a run or a sweep, and see to it that its data can be had by those on other machines."""
    from train.worker import Task

    data, session = start.data, start.session
    send_data(session.storage, data.folder)
    files = (str(start.folder), str(data.train_file), str(data.heldout_file))
    return Task(config, run_id, *files, data.longest_tokens, session.mlflow_url, sizing, session.storage)


def wait_readily(config: ChatbotConfig) -> "Standby | None":
    """Where this job's process was started before its turn: do what takes seconds, and wait for its cards; return the worker that waited.

    Raises:
        SystemExit: The job is not wanted any more.
    """
    if not is_early():
        return None
    session, standby = with_joined(require_session()), None
    with suppress(ClusterError):  # told at its turn, where it is still so
        connect(session)
        if config.train.num_workers == 1 and (card := likely_card(session.cards)):
            from train.standby import begin_standby

            standby = begin_standby(config.train, card)  # which imports meanwhile
    for module in SLOW_IMPORTS:
        import_module(module)
    wait_for_turn()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray took it as it connected; until there is a run, whoever is stopped ends at once
    return standby


def had_ended(run_id: str) -> bool:
    """Whether this is a job of the queue that had ended well, and what it ran in was killed before anybody saw that."""
    if JOB_VARIABLE not in os.environ:
        return False
    client = Registry(require_session().mlflow_url).client
    with mlflow_errors(client.tracking_uri):
        return bool(client.get_run(run_id).info.status == FINISHED)


@contextmanager
def on_record(start: Start, num_cards: int) -> Iterator[Record]:
    """Connect to the cluster, and keep the record of what is done there: begun or taken up, and how it ended unless that was well.

    Raises:
        KeyboardInterrupt: Somebody asked it to stop; the record says so.
        TandemError: The cluster cannot do it, or what was done failed.
    """
    # Ray, as it connects, takes SIGTERM for itself.
    with connected(start.session), on_signals(signal.default_int_handler):
        require_cards(num_cards)
        if start.earlier:
            require_at_rest(start.earlier.run_id)
        record = start.earlier or Record.create(start.registry.client, start.config.name)
        try:
            if start.earlier:
                record.reopen()
            else:
                record.describe(start.config, start.data, start.base_fingerprint, start.kind)
            note_run(record.run_id)
            yield record
        except BaseException as error:
            asked = isinstance(error, KeyboardInterrupt)
            with suppress(RegistryError):  # MLflow may be the very thing that failed
                record.end(STOPPED if asked else FAILED, ASKED if asked else str(error))
            raise


def say_who_asks(session: Session) -> None:
    """Set what Ray reads as it is imported, and talks to no cluster without."""
    os.environ.update({key: value for key, value in session.environment().items() if key.startswith("RAY_AUTH") or key == LOGS_VARIABLE})


@contextmanager
def connected(session: Session) -> Iterator[None]:
    """Be connected to the cluster."""
    connect(session)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def connect(session: Session) -> None:
    """Connect to the cluster, as part of a Ray job or straight, where this process has not yet."""
    say_who_asks(session)
    # Before Ray connects: a process that loads torch afterwards, in a Ray job, dies in MKL ("Cannot load libtorch_cpu.so").
    import ray
    import torch  # noqa: F401

    if ray.is_initialized():
        return
    inside_job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    try:
        ray.init(address=None if inside_job else session.ray_address, namespace=RAY_NAMESPACE, log_to_driver=False, logging_level="warning")
    except ConnectionError as error:
        raise ClusterError("the cluster does not answer", str(error), "python -m cluster down, then python -m cluster up") from error


def count_cards() -> int:
    """Return how many cards this process may train on, free or not."""
    import ray

    return sum(node["Alive"] and is_usable(node["Labels"]) for node in ray.nodes())


def require_cards(num_workers: int) -> None:
    """Refuse what would wait for ever: more workers than the cluster has train cards."""
    num_cards = count_cards()
    if num_cards < num_workers:
        why = f"the cluster has {num_cards} of them; a worker would wait for ever"
        raise ClusterError(f"train.num_workers={num_workers} wants as many train cards", why, f"train.num_workers={max(1, num_cards)}")


def require_at_rest(run_id: str) -> None:
    """Refuse to go on with a run that another process is training."""
    from train.control import is_going_on

    if is_going_on(run_id):
        raise RunError(f"run {run_id} is still going on", "its driver is at work in this cluster", "wait for it to end, or stop its job")


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Answer SIGTERM, which `ray job stop` sends, and SIGINT with one handler."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
