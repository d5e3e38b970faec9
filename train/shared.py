"""A group of adapters on one base, asked from many threads: those that want steps at the same time take them together.

Knows turns and waiting. Does not know tensors, or Ray: a Ray actor with several threads can hold it.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from configs.schema import ChatbotConfig
from data.template import load_tokenizer
from train.group import Group
from train.learner import Learner
from train.model import load_base
from train.rows import read_rows

Metrics = dict[str, float]


@dataclass
class Request:
    """Steps that somebody waits for."""

    num_steps: int
    answer: "Future[Metrics]"
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    began_s: float = field(default_factory=time.perf_counter)


class SharedBase:
    """One base, many adapters: any thread may call at any time, and waits for its answer."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.card = ThreadPoolExecutor(1, "card")  # whatever touches the base does it here, in turn
        self.requests: dict[str, Request] = {}
        self.lock = threading.Lock()
        self.stepping = False

    def join(self, trial_id: str, config: ChatbotConfig, checkpoint: Path | None = None) -> Metrics:
        """Add an adapter, fresh or from a checkpoint; return its position."""
        self.card.submit(self.group.join, trial_id, config, checkpoint).result()
        learner = self.group.members[trial_id].learner
        return {"step": learner.step, "num_steps": learner.num_steps}

    def advance(self, trial_id: str, num_steps: int) -> Metrics:
        """Take so many steps, or those that are left, together with all others that wait for theirs."""
        assert trial_id in self.group.members, f"{trial_id} has not joined"
        request = Request(num_steps, Future())
        with self.lock:
            self.requests[trial_id] = request
            if not self.stepping:
                self.stepping = True
                self.card.submit(self._step_requested)
        return request.answer.result()

    def evaluate(self, trial_id: str) -> float:
        """Return the held-out loss, as a Trainer measures it."""
        return self.card.submit(self.group.evaluate, trial_id).result()

    def save(self, trial_id: str, folder: Path) -> None:
        """Write adapter, optimizer and position as a Trainer's checkpoint; the folder is new or empty."""
        self.card.submit(self.group.save, trial_id, folder).result()

    def leave(self, trial_id: str) -> None:
        """Take an adapter away, and free its memory."""
        self.card.submit(self.group.leave, trial_id).result()

    def _step_requested(self) -> None:
        """Take one step with all that wait for one, and another while somebody waits."""
        with self.lock:
            requests = dict(self.requests)
        try:
            ready = [trial_id for trial_id, request in requests.items() if len(request.losses) < request.num_steps]
            ready = [trial_id for trial_id in ready if not self.group.members[trial_id].learner.done]
            before = {trial_id: self.group.members[trial_id].learner.num_tokens for trial_id in ready}
            for trial_id, loss in self.group.step(ready).items():
                requests[trial_id].losses.append(loss)
                requests[trial_id].num_tokens += self.group.members[trial_id].learner.num_tokens - before[trial_id]
            served = [
                trial_id
                for trial_id, request in requests.items()
                if len(request.losses) >= request.num_steps or self.group.members[trial_id].learner.done
            ]
            answers = {trial_id: _metrics(self.group.members[trial_id].learner, requests[trial_id]) for trial_id in served}
        except BaseException as error:
            with self.lock:
                self.requests, self.stepping = {}, False
            for request in requests.values():
                request.answer.set_exception(error)
            return
        with self.lock:
            for trial_id in served:
                del self.requests[trial_id]
            self.stepping = bool(self.requests)
            if self.stepping:
                self.card.submit(self._step_requested)  # behind whatever else waits for the card
        for trial_id, metrics in answers.items():
            requests[trial_id].answer.set_result(metrics)


def share_base(config: ChatbotConfig, model_folder: Path, train_file: Path, heldout_file: Path) -> SharedBase:
    """Load base and rows as a run of its own would; `train.group.why_apart` tells which other configs may join them.

    Raises:
        ModelError: The model's layers do not allow it.
    """
    tokenizer = load_tokenizer(model_folder)
    rows, heldout = (read_rows(file, tokenizer, config.data) for file in (train_file, heldout_file))
    longest_tokens = max(len(row["input_ids"]) for row in rows + heldout)
    as_packed = config.train.model_copy(update={"packing": True})  # rows lie end to end, whatever each adapter's own batches look like
    base = load_base(model_folder, config.model, as_packed, longest_tokens)
    return SharedBase(Group(base, rows, heldout, config.train.gradient_checkpointing is True))


def _metrics(learner: Learner, request: Request) -> Metrics:
    found: Metrics = {"step": learner.step, "num_steps": learner.num_steps, "num_tokens": learner.num_tokens}
    if request.losses:
        found["loss"] = sum(request.losses) / len(request.losses)
        found["tokens_per_s"] = request.num_tokens / (time.perf_counter() - request.began_s)
    return found
