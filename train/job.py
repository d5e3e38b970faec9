"""One training run from config to registered version: check, prepare, train on a train card, register.

Knows Ray Train and the order of things. Does not know the step.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from cluster.home import home_folder, require_disk
from cluster.job_queue import note_run
from cluster.models import check_model, ensure_model, model_fingerprint
from cluster.placement import card_selector, is_usable
from cluster.registry import Manifest, Registry, Version
from cluster.session import RAY_NAMESPACE, Session, require_session
from configs.errors import ClusterError, RegistryError, RunError, TandemError, last_lines
from configs.schema import ChatbotConfig, MachineConfig
from data.prepare import Prepared, check_source, prepare
from train.record import FAILED, FINISHED, STOPPED, Record, config_fingerprint, git_commit
from train.sizing import require_room, size_prepared

if TYPE_CHECKING:
    from train.control import Progress
    from train.worker import Task

POLL_S = 0.5
ASKED = "the job was asked to stop"
Say = Callable[[str], None]
Handler = Callable[[int, FrameType | None], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a registered version, or the reason why it stopped before its end."""

    run_id: str
    metrics: dict[str, float]
    version: Version | None = None
    stop_reason: str | None = None


def train(config: ChatbotConfig, say: Say, show: Callable[["Progress"], None], resume: str | None = None) -> Outcome:
    """Train one adapter and register it.

    Args:
        config: The chatbot; with `resume` the run's own config takes its place.
        say: Told of each stage, in words.
        show: Told how far the run is, about twice a second.
        resume: Id of a stopped or failed run to go on with.

    Raises:
        TandemError: What the user can mend; nothing was registered.
    """
    session = require_session()
    require_disk(session.machine.get("min_disk_free_gib", MachineConfig().min_disk_free_gib))
    registry = Registry(session.mlflow_url)
    record: Record | None = None
    if resume:
        record, config = Record.find(registry.client, resume)
        say(f"going on with run {resume}")
    check_source(config.data)
    check_model(config.model)
    require_room(config, session.cards)
    say(f"base model {config.model.name}")
    folder = ensure_model(config.model)
    data = prepare(config, folder)
    say(f"data {data.fingerprint}: {data.num_train} conversations to train on, {data.num_heldout} held out{data.left_out}")
    base_fingerprint = model_fingerprint(folder)
    if record:
        record.require_same(data, base_fingerprint)
    sizing = size_prepared(config, folder, data, session.cards)
    if sizing:
        config, step = sizing.settle(config)
        say(sizing.describe(step, data))
    # Ray, as it connects, takes SIGTERM for itself.
    with connect(session), on_signals(signal.default_int_handler):
        require_cards(config.train.num_workers)
        if record:
            require_at_rest(record.run_id)
            record.reopen()
        else:
            record = Record.begin(registry.client, config, data, base_fingerprint)
        note_run(record.run_id)
        say(f"run {record.run_id}")
        try:
            from train.worker import Task

            task = Task(config, record.run_id, str(folder), str(data.train_file), str(data.heldout_file), session.mlflow_url, sizing)
            checkpoint, metrics, stop_reason = _fit(task, session, show)
            if not stop_reason:
                say("registering the adapter")
                manifest = make_manifest(config, record.run_id, base_fingerprint, data, checkpoint, metrics)
                version = registry.register(manifest, checkpoint)
        except KeyboardInterrupt:
            with suppress(RegistryError):
                record.end(STOPPED, ASKED)
            return Outcome(record.run_id, {}, stop_reason=ASKED)
        except BaseException as error:
            with suppress(RegistryError):  # MLflow may be the very thing that failed
                record.end(FAILED, str(error))
            raise
    if stop_reason:
        record.end(STOPPED, stop_reason)
        return Outcome(record.run_id, metrics, stop_reason=stop_reason)
    record.end(FINISHED)
    return Outcome(record.run_id, metrics, version)


@contextmanager
def connect(session: Session) -> Iterator[None]:
    """Connect to the cluster, as part of a Ray job or straight."""
    # Ray reads these as it is imported, and talks to no cluster without them.
    os.environ.update({key: value for key, value in session.environment().items() if key.startswith("RAY_AUTH")})
    # Before Ray connects: a process that loads torch afterwards, in a Ray job, dies in MKL ("Cannot load libtorch_cpu.so").
    import ray
    import torch  # noqa: F401

    inside_job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    try:
        ray.init(address=None if inside_job else session.ray_address, namespace=RAY_NAMESPACE, log_to_driver=False, logging_level="warning")
    except ConnectionError as error:
        raise ClusterError("the cluster does not answer", str(error), "python -m cluster down, then python -m cluster up") from error
    try:
        yield
    finally:
        ray.shutdown()


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


def _fit(task: "Task", session: Session, show: Callable[["Progress"], None]) -> tuple[Path, dict[str, float], str | None]:
    """Run the workers; return the checkpoint to register, its metrics, and why the run was stopped if it was."""
    import ray
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    from train.control import make_control
    from train.worker import train_worker

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave SIGINT to us: Ray's handler would abort the run and exit with status 0."""

    config, run_id = task.config, task.run_id
    control = make_control(run_id)
    keep_best = bool(config.train.early_stopping_patience)
    ranking = {"checkpoint_score_attribute": "eval_loss", "checkpoint_score_order": "min"} if keep_best else {}
    on_gpu = any("gpu-share" in card for card in session.cards if card["pool"] == "train")
    num_threads = max(1, (psutil.cpu_count() or 1) // config.train.num_workers)
    trainer = Trainer(
        train_worker,
        train_loop_config=task,
        scaling_config=ray_train.ScalingConfig(
            num_workers=config.train.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"card": 1, "CPU": 1, **({"GPU": 1} if on_gpu else {})},
            label_selector=card_selector(),
        ),
        run_config=ray_train.RunConfig(
            name=run_id,
            storage_path=str(home_folder() / "runs"),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=config.train.num_checkpoints_kept, **ranking),
            failure_config=ray_train.FailureConfig(max_failures=config.train.max_failures),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_threads)}} if not on_gpu else None,
        ),
    )
    with _watch(control, show) as stop_reason:
        try:
            result = trainer.fit()
        except ray_train.TrainingFailedError as error:
            raise _failure(error, run_id) from None
        refusal: TandemError | None = ray.get(control.read_refusal.remote())
    if refusal:
        raise refusal
    if result.error or result.checkpoint is None:
        raise _failure(result.error or RuntimeError("it ended without a checkpoint"), run_id)
    kept = [(Path(checkpoint.path), metrics) for checkpoint, metrics in result.best_checkpoints]
    newest = next(entry for entry in kept if entry[0] == Path(result.checkpoint.path))
    if newest[1]["step"] < newest[1]["num_steps"] and (stop_reason() or not keep_best):
        return *newest, stop_reason() or "stopped"
    # Of those without a held-out loss of their own, none was measured.
    measured = [entry for entry in kept if "eval_loss" in entry[1]] if keep_best else []
    best = min(measured, key=lambda entry: entry[1]["eval_loss"], default=newest)
    return *best, None


def _failure(error: Exception, run_id: str) -> TandemError:
    """Tell the reason that a worker found, or else its last lines, which name it."""
    for cause in getattr(error, "worker_failures", {}).values():
        if isinstance(cause, TandemError):
            return cause
    why = last_lines(str(error))
    if not any((home_folder() / "runs" / run_id).glob("checkpoint_*/")):  # Ray keeps a file of that name beside them
        return RunError("training failed before its first checkpoint", why, "mend the reason, then begin anew")
    return RunError(
        "training failed", why, f"mend the reason, then python -m train CONFIG --resume {run_id}, or without --resume to begin anew"
    )


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Answer SIGTERM, which `ray job stop` sends, and SIGINT with one handler."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _watch(control: Any, show: Callable[["Progress"], None]) -> Iterator[Callable[[], str | None]]:
    """Show progress while the run goes on, and pass a signal to end on to the workers as a wish to stop.

    KeyboardInterrupt is raised where nobody is there yet to hear the wish, and for whoever asks a second time.
    """
    import ray

    done, asked, begun = threading.Event(), threading.Event(), threading.Event()

    def look(shown: "Progress | None") -> "Progress | None":
        if asked.is_set():
            ray.get(control.ask_to_stop.remote(ASKED))
        progress: Progress | None = ray.get(control.read.remote())
        if progress and progress != shown:
            begun.set()
            show(progress)
        return progress

    def watch() -> None:
        shown = None
        with suppress(ray.exceptions.RayError):  # the cluster is gone, and fit() tells why
            while not done.wait(POLL_S):
                shown = look(shown)

    def ask(number: int, frame: FrameType | None) -> None:
        at_once = asked.is_set() or not begun.is_set()
        asked.set()
        if at_once:
            raise KeyboardInterrupt

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with on_signals(ask):
            yield lambda: ASKED if asked.is_set() else None
    finally:
        done.set()
        watcher.join()


def make_manifest(
    config: ChatbotConfig, run_id: str, base_fingerprint: str, data: Prepared, checkpoint: Path, metrics: dict[str, float]
) -> Manifest:
    """Say what an adapter was made from; `checkpoint` is its folder, `metrics` what was reported with it."""
    import json

    modules = json.loads((checkpoint / "adapter_config.json").read_text())["target_modules"]
    return Manifest(
        chatbot=config.name,
        base_model=config.model.name,
        base_fingerprint=base_fingerprint,
        rank=config.train.lora.rank,
        target_modules=sorted(modules),
        quantization=config.train.quantization,
        data_fingerprint=data.fingerprint,
        data_sources=data.sources,
        config_fingerprint=config_fingerprint(config),
        git_commit=git_commit(),
        run_id=run_id,
        finished_s=metrics["saved_s"],
        system_prompt=config.data.system_prompt,
        scores={name: metrics[name] for name in ("loss", "eval_loss", "tokens_per_s", "peak_memory_gib") if name in metrics},
    )
