"""A group of adapters on one base, asked from many threads: those that want steps at the same time take them together.

Knows turns and waiting. Does not know tensors, or Ray: a Ray actor with several threads can hold it.
"""

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from configs.schema import ChatbotConfig
from data.template import load_tokenizer
from train.group import Group
from train.learner import Learner
from train.memory import MAX_BATCH_TOKENS, is_out_of_memory
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

    def has_all(self, learner: Learner) -> bool:
        """Whether these steps are done, or there are no more."""
        return len(self.losses) >= self.num_steps or learner.done

    def metrics(self, learner: Learner) -> Metrics:
        """Return where the learner is, and how these steps went."""
        found: Metrics = {"step": learner.step, "num_steps": learner.num_steps, "num_tokens": learner.num_tokens}
        if self.losses:
            found["loss"] = sum(self.losses) / len(self.losses)
            found["tokens_per_s"] = self.num_tokens / (time.perf_counter() - self.began_s)
        return found


class SharedBase:
    """One base, many adapters: any thread may call at any time, and waits for its answer."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.card = ThreadPoolExecutor(1, "card")  # whatever touches the base does it here, in turn
        self.requests: dict[str, Request] = {}
        self.lock = threading.RLock()
        self.stepping = False
        self.num_together = sys.maxsize  # adapters that memory holds in one pass, as far as is known

    def join(self, trial_id: str, config: ChatbotConfig, checkpoint: Path | None = None) -> Metrics:
        """Add an adapter, fresh or from a checkpoint; return its position. What an earlier one of that name waits for ends."""

        def begin() -> Metrics:
            self._drop(trial_id)
            self.num_together = sys.maxsize
            self.group.join(trial_id, config, checkpoint)
            learner = self.group.members[trial_id].learner
            return {"step": learner.step, "num_steps": learner.num_steps, "num_tokens": learner.num_tokens}

        return self.card.submit(begin).result()

    def advance(self, trial_id: str, num_steps: int) -> Metrics:
        """Take so many steps, or those that are left, together with all others that wait for theirs."""
        request = Request(num_steps, Future())
        with self.lock:
            self._drop(trial_id)
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
        """Take an adapter away, and free its memory; what it waits for ends."""

        def end() -> None:
            self._drop(trial_id)
            self.num_together = sys.maxsize
            self.group.leave(trial_id)

        self.card.submit(end).result()

    def _drop(self, trial_id: str) -> None:
        """Let nobody wait for an adapter's steps any more: who asked for them was killed, or is going."""
        with self.lock:
            request = self.requests.pop(trial_id, None)
        if request:
            request.answer.set_exception(RuntimeError(f"{trial_id} was taken away, or asked anew, before these steps were done"))

    def _step_requested(self) -> None:
        """Take one step with all that wait for one, and another while somebody waits."""
        with self.lock:
            requests = dict(self.requests)
        found = self._answers(requests)
        with self.lock:
            # Another request may have come in the place of one of these, which then has its answer.
            found = {trial_id: answer for trial_id, answer in found.items() if self.requests.get(trial_id) is requests[trial_id]}
            for trial_id in found:
                del self.requests[trial_id]
            self.stepping = bool(self.requests)
            if self.stepping:
                self.card.submit(self._step_requested)  # behind whatever else waits for the card
        for trial_id, answer in found.items():
            if isinstance(answer, BaseException):
                requests[trial_id].answer.set_exception(answer)
            else:
                requests[trial_id].answer.set_result(answer)

    def _answers(self, requests: dict[str, Request]) -> dict[str, Metrics | BaseException]:
        """Take a step with all that want one; return the answers of those that have all their steps, or get no more."""
        learners = {trial_id: self.group.members[trial_id].learner for trial_id in requests if trial_id in self.group.members}
        answers: dict[str, Metrics | BaseException] = {
            trial_id: RuntimeError(f"{trial_id} has not joined") for trial_id in requests.keys() - learners.keys()
        }
        ready = [trial_id for trial_id, learner in learners.items() if not requests[trial_id].has_all(learner)]
        before = {trial_id: learners[trial_id].num_tokens for trial_id in ready}
        try:
            found = self._step(ready)
        except BaseException as error:
            return dict.fromkeys(requests, error)
        for trial_id, loss in found.items():
            if isinstance(loss, BaseException):
                answers[trial_id] = loss
            else:
                requests[trial_id].losses.append(loss)
                requests[trial_id].num_tokens += learners[trial_id].num_tokens - before[trial_id]
        for trial_id in learners.keys() - answers.keys():
            if requests[trial_id].has_all(learners[trial_id]):
                answers[trial_id] = requests[trial_id].metrics(learners[trial_id])
        return answers

    def _step(self, trial_ids: list[str]) -> dict[str, float | RuntimeError]:
        """Take a step of each of these, as many together as memory holds; one for which it is too small alone has the error instead."""
        found: dict[str, float | RuntimeError] = {}
        while waiting := trial_ids[len(found) :]:
            together = waiting[: self.num_together]
            try:
                found |= self.group.step(together)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(together) == 1:
                    found[together[0]] = error.with_traceback(None)  # whose frames hold what was computed
                self.num_together = max(1, len(together) // 2)
        return found


def share_base(
    config: ChatbotConfig, model_folder: Path, train_file: Path, heldout_file: Path, max_batch_tokens: int = MAX_BATCH_TOKENS
) -> SharedBase:
    """Load base and rows as a run of its own would; `train.group.why_apart` tells which other configs may join them.

    Raises:
        ModelError: The model's layers do not allow it.
    """
    tokenizer = load_tokenizer(model_folder)
    rows, heldout = (read_rows(file, tokenizer, config.data) for file in (train_file, heldout_file))
    longest_tokens = max(len(row["input_ids"]) for row in rows + heldout)
    as_packed = config.train.model_copy(update={"packing": True})  # rows lie end to end, whatever each adapter's own batches look like
    base = load_base(model_folder, config.model, as_packed, longest_tokens)
    return SharedBase(Group(base, rows, heldout, config.train.gradient_checkpointing is True, max_batch_tokens))
