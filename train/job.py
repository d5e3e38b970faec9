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

from cluster.placement import card_selector, is_usable, job_resources
from cluster.registry import Manifest, Version
from cluster.session import Session
from cluster.versions import git_commit
from configs.errors import ClusterError, RunError, TandemError, last_lines
from configs.schema import ChatbotConfig
from train.driver import ASKED, Say, Start, make_ready, make_task, on_record, on_signals
from train.places import has_checkpoint, on_disk, runs_place
from train.record import FINISHED, STOPPED, config_fingerprint
from train.sizing import size_prepared

if TYPE_CHECKING:
    from train.control import Progress
    from train.standby import Standby
    from train.worker import Task

POLL_S = 0.5
ANSWERS_WITHIN_S = 1.0  # else it may be a minute, and the card is wanted
# Of Ray Train's controller.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # it takes one checkpoint at each look; by Ray's two seconds a run also ends later
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for what our workers do not ask: the run's control calls them back
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # it would write to the console; `train.controller` says where it writes
}
DEATHS = ("ActorDiedError", "ActorUnavailableError", "NodeDiedError", "OwnerDiedError", "WorkerCrashedError")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a registered version, or the reason why it stopped before its end."""

    run_id: str
    metrics: dict[str, float]
    version: Version | None = None
    stop_reason: str | None = None


def train(
    config: ChatbotConfig, say: Say, show: Callable[["Progress"], None], resume: str | None = None, standby: "Standby | None" = None
) -> Outcome:
    """Train one adapter and register it.

    Args:
        config: The chatbot; with `resume` the run's own config takes its place.
        say: Told of each stage, in words.
        show: Told how far the run is, about twice a second.
        resume: Id of a stopped or failed run to go on with.
        standby: A worker that is there already, if there is one.

    Raises:
        TandemError: What the user can mend; nothing was registered.
    """
    start = make_ready(config, say, resume=resume)
    config, data = start.config, start.data
    sizing = size_prepared(config, start.folder, data, start.session.job_cards)
    if sizing:
        config, step = sizing.settle(config)
        say(sizing.describe(step, data))
    else:
        say("plan: it does not know this model; what is `auto` is the whole batch at once, with nothing recomputed")
    run_id, version = "", None
    try:
        with on_record(start, config.train.num_workers) as record:
            run_id = record.run_id
            say(f"run {run_id}")
            task = make_task(start, config, run_id, sizing)
            checkpoint, metrics, stop_reason = _fit(task, start.session, show, standby)
            if not stop_reason:
                say("registering the adapter")
                made = start.registry.of_run(run_id) if resume else None  # by a driver that was killed then
                version = made or start.registry.register(make_manifest(start, run_id, checkpoint, metrics), checkpoint)
    except KeyboardInterrupt:
        if not run_id:
            raise
        return Outcome(run_id, {}, stop_reason=ASKED)
    record.end(STOPPED if stop_reason else FINISHED, stop_reason or "")
    return Outcome(run_id, metrics, version, stop_reason)


def _fit(
    task: "Task", session: Session, show: Callable[["Progress"], None], standby: "Standby | None"
) -> tuple[Path, dict[str, float], str | None]:
    """Run the workers; return the checkpoint to register, its metrics, and why the run was stopped if it was."""
    import ray
    from ray import train as ray_train

    from train.control import make_control
    from train.controller import Trainer, Workers
    from train.standby import worker_environment
    from train.worker import train_worker

    config, run_id = task.config, task.run_id
    os.environ.update(SETTINGS)
    control = make_control(run_id)
    keep_best = bool(config.train.early_stopping_patience)
    ranking = {"checkpoint_score_attribute": "eval_loss", "checkpoint_score_order": "min"} if keep_best else {}
    cards = [card for card in session.cards if is_usable(card)]
    on_gpu = any("gpu-share" in card for card in cards)
    trainer = Trainer(
        train_worker,
        train_loop_config=task,
        scaling_config=ray_train.ScalingConfig(
            num_workers=config.train.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=job_resources(on_gpu),
            label_selector=card_selector(),
        ),
        run_config=ray_train.RunConfig(
            name=run_id,
            storage_path=runs_place(task.storage),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=config.train.num_checkpoints_kept, **ranking),
            failure_config=ray_train.FailureConfig(max_failures=config.train.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config.train, cards)},
        ),
    )
    Workers.standby = standby
    with _watch(control, show) as stop_reason:
        try:
            result = trainer.fit()
        except ray_train.TrainingFailedError as error:
            raise _failure(error, run_id, task.storage) from None
        refusal: TandemError | None = ray.get(control.read_refusal.remote())
    if refusal:
        raise refusal
    if result.error or result.checkpoint is None:
        raise _failure(result.error or RuntimeError("it ended without a checkpoint"), run_id, task.storage)
    newest, metrics = next(entry for entry in result.best_checkpoints if entry[0].path == result.checkpoint.path)
    if metrics["step"] < metrics["num_steps"] and (stop_reason() or not keep_best):
        return on_disk(newest), metrics, stop_reason() or "stopped"
    # Of those without a held-out loss of their own, none was measured.
    measured = [entry for entry in result.best_checkpoints if "eval_loss" in entry[1]] if keep_best else []
    best, metrics = min(measured, key=lambda entry: entry[1]["eval_loss"], default=(newest, metrics))
    return on_disk(best), metrics, None


def _failure(error: Exception, run_id: str, storage: str = "") -> TandemError:
    """Tell the reason that a worker found, or else its last lines, which name it."""
    for cause in getattr(error, "worker_failures", {}).values():
        if isinstance(cause, TandemError):
            return cause
    why = last_lines(str(error))
    if any(name in str(error) for name in DEATHS):
        return ClusterError("a part of the cluster died under the training", why, f"python -m train CONFIG --resume {run_id}")
    if not has_checkpoint(storage, run_id):
        return RunError("training failed before its first checkpoint", why, "mend the reason, then begin anew")
    return RunError(
        "training failed", why, f"mend the reason, then python -m train CONFIG --resume {run_id}, or without --resume to begin anew"
    )


@contextmanager
def _watch(control: Any, show: Callable[["Progress"], None]) -> Iterator[Callable[[], str | None]]:
    """Show progress while the run goes on, and pass a signal to end on to the workers as a wish to stop.

    KeyboardInterrupt is raised where nobody is there yet to hear the wish, and for whoever asks a second time.
    """
    import ray

    done, asked = threading.Event(), threading.Event()

    def watch() -> None:
        shown: Progress | None = None
        reader = _Reader(control)
        with suppress(ray.exceptions.RayError):  # the cluster is gone, and fit() tells why
            while not done.wait(POLL_S):
                progress = reader.newest() or shown
                if asked.is_set() and progress is None and not done.is_set():
                    os.kill(os.getpid(), signal.SIGINT)  # as if somebody asked a second time
                    return
                if asked.is_set():
                    control.ask_to_stop.remote(ASKED)  # again and again
                if progress and progress != shown:
                    show(progress)
                shown = progress

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with on_signals(ask):
            yield lambda: ASKED if asked.is_set() else None
    finally:
        done.set()
        watcher.join()


class _Reader:
    """Asks how far the workers are, without waiting long: the one to answer may still start, behind many others on few cores."""

    def __init__(self, control: Any) -> None:
        self.control, self.asked = control, None

    def newest(self) -> "Progress | None":
        """Return how far they are; None too while nobody answers what was asked."""
        import ray

        self.asked = self.asked or self.control.read.remote()
        if not ray.wait([self.asked], timeout=ANSWERS_WITHIN_S)[0]:
            return None
        answered, self.asked = self.asked, None
        progress: Progress | None = ray.get(answered)
        return progress


def make_manifest(start: Start, run_id: str, checkpoint: Path, metrics: dict[str, float]) -> Manifest:
    """Say what an adapter was made from; `checkpoint` is its folder, `metrics` what was reported with it."""
    import json

    modules, config = json.loads((checkpoint / "adapter_config.json").read_text())["target_modules"], start.config
    return Manifest(
        chatbot=config.name,
        base_model=config.model.name,
        base_fingerprint=start.base_fingerprint,
        rank=config.train.lora.rank,
        target_modules=sorted(modules),
        quantization=config.train.quantization,
        precision=config.train.precision,
        data_fingerprint=start.data.fingerprint,
        data_sources=start.data.sources,
        config_fingerprint=config_fingerprint(config),
        git_commit=git_commit(),
        run_id=run_id,
        finished_s=metrics["saved_s"],
        system_prompt=config.data.system_prompt,
        scores={name: metrics[name] for name in ("loss", "eval_loss", "tokens_per_s", "peak_memory_gib") if name in metrics},
    )
