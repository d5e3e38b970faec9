"""What a run tells while it runs: curves to MLflow, progress and checkpoints to its host.

Knows transformers' callbacks. Does not know how the loss is made.
"""

import math
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from cluster.home import BYTES_PER_GIB
from cluster.memory import CUDA_CONTEXT_BYTES
from configs.errors import RunError
from train.control import Progress
from train.record import run_logger
from train.step import take_rate
from train.tally import Tally, last_logged_step

if TYPE_CHECKING:
    from train.host import Host
    from train.worker import Task

KIB = 1024
ASK_EVERY_S = 0.5  # in the midst of a step
NUM_WARMUP_STEPS = 5  # kernels are compiled, memory is first taken, and a graph captured in them


class ReportCallback(TrainerCallback):  # type: ignore[misc]
    """Reports after each step, and stops the run when its host asks for it.

    Speed is tokens over the time from step to step, with batching and reporting; evaluation and saving are left out.
    """

    def __init__(self, task: "Task", host: "Host") -> None:
        from mlflow.tracking import MlflowClient

        self.task, self.host = task, host
        self.mlflow = MlflowClient(task.mlflow_url)
        self.log = run_logger(task.run_id, chatbot=task.config.name)
        self.num_steps_here = 0
        self.step_began_s = 0.0  # where the step before it ended, later by what is left out
        self.counted_until_s = 0.0
        self.tokens_at_step_begin = 0
        self.asked_s = 0.0
        self.chance: list[torch.Tensor] = []  # where random numbers were before the step, as a run that goes on there takes them up
        self.steps_s = 0.0
        self.tokens_before = 0
        self.newest: dict[str, float] = {}
        self.evaluated_step: int | None = None
        self.saved_step: int | None = None
        self.tally = Tally(task.config.name)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any) -> None:
        """Count speed from here, not from what an earlier process did before a resume; take the rate that the config names now."""
        take_rate(args.learning_rate, optimizer, lr_scheduler)
        self.tokens_before = self.tokens_at_step_begin = state.num_input_tokens_seen
        if self.host.is_first:
            self.tally.begin(state.global_step, state.num_input_tokens_seen, last_logged_step(self.mlflow, self.task.run_id))
        self._send(state)
        self.step_began_s = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note where random numbers are: the order of rows takes one before an epoch's first step."""
        self.chance = _chance()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note where random numbers are before any other step."""
        if state.epoch % 1:
            self.chance = _chance()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send progress; save and leave if the driver asks for it; evaluate at the end."""
        wait_for_gpu(self.num_steps_here == NUM_WARMUP_STEPS or state.global_step >= state.max_steps)
        if self.num_steps_here == NUM_WARMUP_STEPS:
            self.steps_s, self.tokens_before = 0.0, self.tokens_at_step_begin
        self.num_steps_here += 1
        now_s = time.perf_counter()
        self.steps_s += now_s - self.step_began_s
        self.step_began_s, self.tokens_at_step_begin = now_s, state.num_input_tokens_seen
        if self.host.is_first:
            self.tally.count(state.global_step, state.num_input_tokens_seen)
        if self._asked_to_stop(state):
            control.should_save = control.should_training_stop = True
        elif state.global_step >= state.max_steps:
            control.should_evaluate = True
        self.counted_until_s = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave in the midst of a step, if the driver asks for it, as if it had not begun: it is done anew when the run goes on.

        A process's first step is ended, and so is any step of several workers, who all leave after the same one.
        """
        is_time = time.perf_counter() - self.asked_s >= ASK_EVERY_S
        if self.host.num_workers == 1 and self.num_steps_here and is_time and self._asked_to_stop(state):
            state.num_input_tokens_seen = self.tokens_at_step_begin
            _set_chance(self.chance)
            control.should_save = self.saved_step != state.global_step
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Write losses, rate and speed to MLflow.

        Raises:
            RunError: The loss is no number any more, nor will be.
        """
        names = {"loss": "loss", "eval_loss": "eval_loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "epoch": "epoch"}
        found = {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
        if "loss" in found:
            found["tokens_per_s"] = self._tokens_per_s()
        if not found:
            return
        self.newest.update(found)
        if "eval_loss" in found:
            self.evaluated_step = state.global_step
        if self.host.is_first:
            from mlflow.entities import Metric

            now_ms = int(time.time() * 1000)
            metrics = [Metric(name, value, now_ms, state.global_step) for name, value in found.items()]
            self.mlflow.log_batch(self.task.run_id, metrics=metrics)
            self.tally.show(found)
            self._tell(state, found)
        if not all(math.isfinite(found.get(name, 0.0)) for name in ("loss", "eval_loss")):
            why = "the loss is no number any more: steps were too large, or the data holds what the model cannot compute"
            raise RunError(f"training diverged by step {state.global_step}", why, "begin anew with a smaller train.learning_rate")
        if "eval_loss" not in found:  # else it is part of the evaluation
            self.counted_until_s = time.perf_counter()

    def _tell(self, state: Any, found: dict[str, float]) -> None:
        """Log a step or an evaluation; what there is of neither, at the end, is no news."""
        event = "trained" if "loss" in found else "evaluated" if "eval_loss" in found else None
        if event:
            self.log.info(event, step=state.global_step, num_steps=state.max_steps, memory_gib=round(taken_memory_gib(), 3), **found)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop early where the held-out loss has not got better for so many evaluations; save each one's adapter to choose from."""
        self._leave_out()
        patience = self.task.config.train.early_stopping_patience
        if not patience:
            return
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        control.should_save = True
        if len(losses) - 1 - losses.index(min(losses)) >= patience:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand the checkpoint to the host."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # transformers pickles its own arguments here; nothing of ours reads them.
        (folder / "training_args.bin").unlink(missing_ok=True)
        metrics = {
            **self.newest,
            "step": state.global_step,
            "num_steps": state.max_steps,
            "tokens_per_s": self._tokens_per_s(),
            "saved_s": time.time(),
            "num_tokens": state.num_input_tokens_seen,
            "peak_memory_gib": peak_memory_gib(),
        }
        if self.evaluated_step != state.global_step:  # an older adapter's; Ray ranks a checkpoint without it last
            metrics.pop("eval_loss", None)
        self._compare_memory(state.global_step)
        self.host.report(metrics, folder)
        self.saved_step = state.global_step
        self._leave_out()

    def _compare_memory(self, step: int) -> None:
        """Write what the plan said beside what was taken."""
        if not self.host.is_first or self.task.sizing is None:
            return
        from mlflow.entities import Metric

        found = {"memory/predicted_gib": self.task.sizing.predict_gib(self.task.config.train), "memory/measured_gib": taken_memory_gib()}
        now_ms = int(time.time() * 1000)
        self.mlflow.log_batch(self.task.run_id, metrics=[Metric(name, value, now_ms, step) for name, value in found.items()])

    def _leave_out(self) -> None:
        """Leave out of the speed what was done since the last thing that counts."""
        now_s = time.perf_counter()
        self.step_began_s += now_s - self.counted_until_s
        self.counted_until_s = now_s

    def _tokens_per_s(self) -> float:
        return (self.tokens_at_step_begin - self.tokens_before) / self.steps_s if self.steps_s else 0.0

    def _send(self, state: Any) -> str | None:
        progress = Progress(
            state.global_step, state.max_steps, self.newest.get("loss"), self._tokens_per_s() or None, self.newest.get("eval_loss")
        )
        return self.host.send(progress)

    def _asked_to_stop(self, state: Any) -> bool:
        """Ask the driver; with several workers the first one asks for all, since all must leave after the same step."""
        self.asked_s = time.perf_counter()
        asked = bool(self._send(state)) if self.host.is_first else False
        if self.host.num_workers == 1:
            return asked
        flag = torch.tensor([int(asked)], device="cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())


def _chance() -> list[torch.Tensor]:
    """Return where torch's random numbers are; a GPU is not waited for."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_chance(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def wait_for_gpu(is_wanted: bool) -> None:
    """Wait until the GPU has done what it was told, where a time is to be taken that counts."""
    if is_wanted and torch.cuda.is_available():
        torch.cuda.synchronize()


def taken_memory_gib() -> float:
    """Return the most memory that this process took, in GiB, as the plan means it.

    On its GPU all that torch's allocator held there, and the context, which no process can see by itself; resident without a GPU. What the
    driver keeps of steps that are CUDA graphs, some 100 MiB, is planned and not in it.
    """
    if torch.cuda.is_available():
        return (float(torch.cuda.max_memory_reserved()) + CUDA_CONTEXT_BYTES) / BYTES_PER_GIB
    return peak_memory_gib()


def peak_memory_gib() -> float:
    """Return the most memory that this process held: in tensors on its GPU, or resident without one, in GiB."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / BYTES_PER_GIB
