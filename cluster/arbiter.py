"""Carries out the rule: looks, asks `cluster.rule`, and starts jobs, asks them to leave, and says how many engines chat may have.

All that it knows between two looks is on disk (`cluster.job_queue`), written before it is done: it may be killed at any moment, and the
next one goes on. Knows the order of things. Does not know how they are done: see `Ground`, and `cluster.ray_ground` for the real one.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from cluster.job_queue import CANCELLED, DONE, FAILED, LEAVING, STANDING, SUBMISSION, WAITING, Queue, QueuedJob, clock
from cluster.rule import TRAIN, Card, Chat, Job, Leave, Snapshot, Start, decide
from configs.errors import EXIT_BAD_INPUT, EXIT_NO_FIT, EXIT_NOT_PROMOTED, EXIT_STOPPED, TandemError
from configs.schema import LendingConfig

LOST = -1  # the exit status of what was killed
# What a process imports would slow chat that is at work, unless there are cores enough: then one gets ready at once.
READY_AFTER_S = 2.0  # of quiet
READY_WITH_CORES = 4
GONE_S = 60.0  # a card whose processes were killed is back sooner, and its run goes on there by itself

log = logging.getLogger("tandem.arbiter")


@dataclass(frozen=True)
class Driver:
    """The process of a job, as Ray tells of it."""

    state: Literal["alive", "stopped", "ended"]
    exit_status: int = LOST


@dataclass(frozen=True)
class Sight:
    """What there is to see at one moment."""

    cards: tuple[Card, ...]
    chat: Chat
    num_engines: tuple[int, int] | None
    """Fewest and most engines now in force; None where there is no chat."""
    drivers: Mapping[str, Driver]
    """By the name of their submission."""
    lost_chat: bool = False
    """Whether there is no chat although it was asked for: the head was started anew."""
    num_answering: int = 0
    """Engines that run, have their card, and are reached."""
    num_idle_cores: float = 0.0
    """Of this machine, since the last look."""


class Ground(Protocol):
    """The cluster, as far as the arbiter sees and moves it."""

    def look(self) -> Sight:
        """Look at cards, chat and drivers."""

    def submit(self, job: QueuedJob) -> None:
        """Start a job's process, unless there is one by the name of its submission."""

    def stop(self, submission: str) -> None:
        """Ask a job's process to save and leave; again and again is as once."""

    def words(self, submission: str) -> str:
        """Return the last thing of note that a job's process said."""

    def tail(self, submission: str) -> str:
        """Return the last lines that a job's process said."""

    def bound(self, fewest: int, most: int) -> None:
        """Set how many engines chat may have."""

    def send_to_sleep(self, card: str) -> bool:
        """Tell the engine on a card to give it back while it has no request; return whether it was not told yet."""

    def restore_chat(self) -> None:
        """Deploy chat again as it was."""


class Arbiter:
    """One arbiter at its work."""

    def __init__(self, queue: Queue, ground: Ground, lending: LendingConfig) -> None:
        self.queue, self.ground, self.lending = queue, ground, lending
        self.missing_since_s: dict[str, float] = {}
        self.spoilt: set[int] = set()
        """Jobs whose process ended before its turn: this arbiter gets none ready for them again."""

    def step(self, now_s: float, note: Callable[[Sight, float], None] = lambda seen, now_s: None) -> None:
        """Look once, and do what is to be done now; what was seen is noted also where that cannot be done."""
        seen = self.ground.look()
        try:
            self._respond(seen, now_s)
        finally:
            note(seen, now_s)

    def _respond(self, seen: Sight, now_s: float) -> None:
        for job in self.queue.jobs(*STANDING):
            try:
                if job.state != WAITING:
                    self._follow(job, seen, now_s)
                elif job.submission:
                    self._follow_early(job, seen, now_s)
            except (TandemError, OSError, ValueError) as error:  # the others are looked after all the same
                log.warning("job %d: %s", job.id, error)
        if seen.lost_chat:
            log.info("chat is deployed again, which the cluster forgot")
            self.ground.restore_chat()
            self.queue.note_handover("chat", "chat is deployed again", "the cluster was started anew", now_s)
            return
        jobs = tuple(_in_line(job) for job in self.queue.jobs(*STANDING))
        decision = decide(Snapshot(now_s, seen.cards, seen.chat, jobs), self.lending)
        for action in decision.actions:
            self._act(action, now_s)
        for card in decision.bedtimes:
            if self.ground.send_to_sleep(card):
                what, why = f"the engine on {card} goes to sleep", "chat is quiet, and a job waits for the card"
                log.info("%s: %s", what, why)
                self.queue.note_handover("chat", what, why, now_s)
        self.queue.explain(decision.waits)
        if seen.num_engines not in (None, decision.num_engines):
            fewest, most = decision.num_engines
            what, why = f"chat may have {fewest} to {most} engines", decision.engines_reason or "as its config says"
            log.info("%s: %s", what, why)
            self.ground.bound(fewest, most)
            self.queue.note_handover("chat", what, why, now_s)
        # Last: what fails here keeps chat and jobs from nothing.
        self._get_ready(decision.next_job, seen.chat.quiet_s >= READY_AFTER_S or seen.num_idle_cores >= READY_WITH_CORES)
        self._end_nobodys(seen)

    def _act(self, action: Start | Leave, now_s: float) -> None:
        if isinstance(action, Leave):
            if self.queue.ask_to_leave(action.job, action.reason, now_s):
                log.info("job %d is asked to leave: %s", action.job, action.reason)
                self.ground.stop(self.queue.find(action.job).submission)
        elif job := self.queue.begin(action.job, action.cards, action.reason, now_s):
            log.info("job %d starts on %s: %s", job.id, ", ".join(job.cards), action.reason)
            self._submit(job)

    def _get_ready(self, next_job: int | None, slows_nobody: bool) -> None:
        """Start the process of the job that is next, which then waits for its cards; one that is not next any more ends."""
        for job in self.queue.jobs(WAITING):
            if job.submission and job.id != next_job:
                self.queue.forget_process(job.id)
            elif slows_nobody and job.id == next_job and job.id not in self.spoilt and (ready := self.queue.make_ready(job.id)):
                self._submit(ready)

    def _follow_early(self, job: QueuedJob, seen: Sight, now_s: float) -> None:
        """Look after the process of a job that waits. One that is lost is no loss: its job starts anew when it has its cards."""
        driver = seen.drivers.get(job.submission)
        if driver is None:  # the cluster was started anew, or an arbiter was killed between its word and its deed
            self.queue.forget_process(job.id)
        elif driver.state == "alive":
            if not job.is_submitted:
                self.queue.mark_submitted(job.id)
        elif driver.exit_status == EXIT_BAD_INPUT:  # as it would say at its turn
            self._end(job, FAILED, self.ground.words(job.submission), now_s)
            self._tell_failure(job)
        else:
            log.info("job %d: its process ended before its turn: %s", job.id, self.ground.words(job.submission))
            self.spoilt.add(job.id)
            self.queue.forget_process(job.id)

    def _end_nobodys(self, seen: Sight) -> None:
        """Ask processes to leave that no job names any more, such as one that got ready for a job which is not next now."""
        named = {job.submission for job in self.queue.jobs(*STANDING)}
        for name, driver in seen.drivers.items():
            if driver.state == "alive" and name.startswith(SUBMISSION) and name not in named:
                self.ground.stop(name)

    def _submit(self, job: QueuedJob) -> None:
        self.ground.submit(job)
        self.queue.mark_submitted(job.id)

    def _follow(self, job: QueuedJob, seen: Sight, now_s: float) -> None:
        """Note what became of a job's process; see to it that there is one, or that it leaves."""
        driver = seen.drivers.get(job.submission)
        if driver is None:
            if job.is_submitted:
                self._end(job, WAITING, "the cluster was started anew; it goes on by itself", now_s)
            elif job.state == LEAVING:
                self._end(job, WAITING, job.reason, now_s)
            else:
                self._submit(job)  # an arbiter was killed between its word and its deed
        elif driver.state == "alive":
            if not job.is_submitted:
                self.queue.mark_submitted(job.id)
            if job.state == LEAVING:
                self.ground.stop(job.submission)
            elif gone := self._gone(job, seen, now_s):
                self._act(Leave(job.id, f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone with the machine"), now_s)
        elif driver.state == "stopped" or driver.exit_status == EXIT_STOPPED:
            self._end(job, WAITING if job.state == LEAVING else CANCELLED, job.reason if job.state == LEAVING else "stopped by hand", now_s)
        elif driver.exit_status == 0:
            self._end(job, DONE, self.ground.words(job.submission), now_s)
        elif driver.exit_status == EXIT_NO_FIT and (larger_gib := self._larger_gib(job, seen)):
            self.queue.want_memory(job.id, larger_gib)
            self._end(job, WAITING, f"{self.ground.words(job.submission)}; it waits for a card of {larger_gib:.4g} GiB", now_s)
        elif driver.exit_status in (EXIT_BAD_INPUT, EXIT_NO_FIT, EXIT_NOT_PROMOTED) and _are_alive(job.cards, seen):
            self._end(job, FAILED, self.ground.words(job.submission), now_s)
            self._tell_failure(job)
        elif job.state == LEAVING:
            self._end(job, WAITING, job.reason, now_s)
        else:
            self._lose(job, f"its process was lost: {self.ground.words(job.submission)}", now_s)

    def _larger_gib(self, job: QueuedJob, seen: Sight) -> float | None:
        """Return the memory of the next larger cards than a job has, where it may get as many as it needs; one that is down may be back.

        What was planned as it was submitted were short rows.
        """
        has_gib = min((card.memory_gib for card in seen.cards if card.name in job.cards), default=math.inf)
        usable = [card.memory_gib for card in seen.cards if card.pool == TRAIN or self.lending.enabled]
        larger = sorted(gib for gib in usable if gib > has_gib)
        return larger[0] if len(larger) >= job.num_cards else None

    def _gone(self, job: QueuedJob, seen: Sight, now_s: float) -> list[str]:
        """Return which of a job's cards were not there for long; another arbiter counts anew, and is late by as much."""
        alive = {card.name for card in seen.cards if card.is_alive}
        for card in job.cards:
            if card in alive:
                self.missing_since_s.pop(card, None)
        return [card for card in job.cards if card not in alive and now_s - self.missing_since_s.setdefault(card, now_s) > GONE_S]

    def _lose(self, job: QueuedJob, reason: str, now_s: float) -> None:
        log.warning("job %d: %s", job.id, reason)
        self.queue.lose(job.id, reason, self.lending.max_attempts, now_s)
        if self.queue.find(job.id).state == FAILED:
            self._tell_failure(job)

    def _tell_failure(self, job: QueuedJob) -> None:
        """Log why a job failed, with its last lines, and what to do about it."""
        resume = f"python -m {'tune' if job.kind == 'sweep' else 'train'} CONFIG --resume {job.run_id}" if job.run_id else ""
        remedy = f"mend the reason, then {resume or 'python -m cluster submit CONFIG'}"
        fields = {
            "job": job.id,
            "chatbot": job.chatbot,
            "run": job.run_id,
            "last_lines": self.ground.tail(job.submission),
            "remedy": remedy,
        }
        log.error(failure_words(job.id), extra={"fields": fields})

    def _end(self, job: QueuedJob, state: str, reason: str, now_s: float) -> None:
        self.queue.end(job.id, state, reason, now_s)
        log.info("job %d left: %s; %s", job.id, self.queue.find(job.id).state, reason)


def failure_words(job_id: int) -> str:
    """Return what the log says of a job that failed: what to look for."""
    return f"job {job_id} failed"


def _are_alive(cards: Sequence[str], seen: Sight) -> bool:
    """Whether a job still has all its cards; of one that has not, an error says nothing."""
    return set(cards) <= {card.name for card in seen.cards if card.is_alive}


def _in_line(job: QueuedJob) -> Job:
    """Return a job as the rule knows it."""
    ends_s = job.ends_s()
    return Job(
        id=job.id,
        kind=job.kind,
        state=cast(Literal["waiting", "running", "leaving"], job.state),
        priority=job.priority,
        place=job.place,
        num_cards=job.num_cards,
        memory_gib=job.memory_gib,
        cards=job.cards,
        since_s=job.since_s,
        ends_at=clock(ends_s) if ends_s else "",
    )
