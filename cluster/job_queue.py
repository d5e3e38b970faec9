"""The line of jobs on disk: what was submitted, what became of it, and why; SQLite in the home folder.

Each change is one transaction, so that `kill -9` at any moment leaves a whole line, and several processes may write. Knows states, not how
a job is run: `cluster.arbiter` carries them out.
"""

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cluster.home import home_folder
from configs.cli import JOB_VARIABLE
from configs.errors import ClusterError

WAITING, RUNNING, LEAVING = "waiting", "running", "leaving"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
STANDING = (WAITING, RUNNING, LEAVING)
SUBMISSION = "tandem-"
"""How the names of the queue's processes begin, by which Ray knows them."""
BUSY_TIMEOUT_S = 30.0
PROGRESS_TIMEOUT_S = 1.0
PARTS_A_RUN = 100
"""In which a sweep tells how far it is, all its trials together: steps of different trials may be of different size."""
ITS_TURN = "its turn"
REASONS = {
    "job % left: done: %": "done",
    "job % left: failed: %": "failed",
    "%: chat wants %": "chat wants it back",
    "job % starts: % lent by chat%": "chat does not need it",
    "%: chat is quiet%": "chat is quiet",
    "%: chat has requests again%": "chat has requests again",
    "%: the engine on its card did not fall asleep%": "an engine did not fall asleep",
    "%: job % goes before it": "a job goes before",
    "job % starts: it is its turn": ITS_TURN,
    "%: cancelled by the user": "by the user",
    "%: stopped by hand": "by the user",
    "job % left: waiting: its process was lost%": "a process was lost",
    "%: % gone with the machine": "a card was lost",
    "job % left: waiting: % it waits for a card of %": "it did not fit",
    "%: the cluster was started anew%": "the cluster was started anew",
    "chat may have %": "as chat's config says, or cards allow",
}
"""Why cards are handed over, in the few words of a metric: by what happened and why, the first that fits."""
OTHER_REASON = "other"
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, chatbot TEXT NOT NULL, config TEXT NOT NULL, folder TEXT NOT NULL,
    priority INTEGER NOT NULL, place REAL NOT NULL, num_cards INTEGER NOT NULL, memory_gib REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting', reason TEXT NOT NULL DEFAULT '', is_cancelled INTEGER NOT NULL DEFAULT 0,
    num_lost INTEGER NOT NULL DEFAULT 0, run_id TEXT NOT NULL DEFAULT '',
    cards TEXT NOT NULL DEFAULT '[]', submission TEXT NOT NULL DEFAULT '', is_submitted INTEGER NOT NULL DEFAULT 0,
    submitted_s REAL NOT NULL, since_s REAL NOT NULL,
    step INTEGER NOT NULL DEFAULT 0, num_steps INTEGER NOT NULL DEFAULT 0, first_step INTEGER NOT NULL DEFAULT 0,
    first_step_s REAL NOT NULL DEFAULT 0, step_s REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS handovers (
    at_s REAL NOT NULL, card TEXT NOT NULL, what TEXT NOT NULL, reason TEXT NOT NULL);
"""


@dataclass(frozen=True)
class QueuedJob:
    """One row of the line."""

    id: int
    kind: Literal["train", "sweep"]
    chatbot: str
    config: str
    """YAML with all that was set when the job was submitted, on the command line too: later edits do not change it."""
    folder: str
    """Where it was submitted; relative paths in the config start there."""
    priority: int
    place: float
    num_cards: int
    memory_gib: float
    state: str
    reason: str
    is_cancelled: bool
    num_lost: int
    """How often its process, card or machine was lost."""
    run_id: str
    """Its MLflow run, by which it goes on; empty before there is one."""
    cards: tuple[str, ...]
    submission: str
    """The name of its Ray job; another one each time that it starts, which Ray takes only once."""
    is_submitted: bool
    submitted_s: float
    since_s: float
    """Since when it is in its state."""
    step: int
    """How far it is; of a sweep in parts of a run."""
    num_steps: int
    """How far it goes; 0 where that is not known."""
    first_step: int
    first_step_s: float
    step_s: float

    def ends_s(self) -> float | None:
        """Return when it is thought to end, by the pace since it started; None where nothing is known."""
        num_done = self.step - self.first_step
        if self.state != RUNNING or not self.num_steps or num_done <= 0:
            return None
        return self.step_s + (self.num_steps - self.step) * (self.step_s - self.first_step_s) / num_done


@dataclass(frozen=True)
class NewJob:
    """What is submitted."""

    kind: Literal["train", "sweep"]
    chatbot: str
    config: str
    folder: str = "."
    priority: int = 0
    num_cards: int = 1
    memory_gib: float = 0.0


class Queue:
    """The line of jobs."""

    def __init__(self, file: Path | str | None = None, timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.file = file or home_folder() / "queue.db"
        try:
            self.connection = sqlite3.connect(self.file, timeout=timeout_s, isolation_level=None)
            self.connection.row_factory = sqlite3.Row
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def submit(self, job: NewJob, now_s: float | None = None) -> QueuedJob:
        """Put a job at the end of the line."""
        now_s = time.time() if now_s is None else now_s
        values = asdict(job) | {"place": now_s, "submitted_s": now_s, "since_s": now_s}
        with self._transaction():
            names = ", ".join(values)
            marks = ", ".join("?" * len(values))
            (row,) = self._execute(f"INSERT INTO jobs ({names}) VALUES ({marks}) RETURNING id", *values.values())  # noqa: S608 (our names)
            return self.find(int(row["id"]))

    def jobs(self, *states: str) -> list[QueuedJob]:
        """Return the jobs in these states, or all, as they were submitted."""
        where = f" WHERE state IN ({', '.join('?' * len(states))})" if states else ""
        return [_job(row) for row in self._execute(f"SELECT * FROM jobs{where} ORDER BY id", *states)]  # noqa: S608 (marks alone)

    def find(self, job_id: int) -> QueuedJob:
        """Return one job.

        Raises:
            ClusterError: There is none.
        """
        row = next(iter(self._execute("SELECT * FROM jobs WHERE id = ?", job_id)), None)
        if row is None:
            raise ClusterError(
                f"there is no job {job_id}", f"none was submitted by that number; see {self.file}", "python -m cluster queue"
            )
        return _job(row)

    def begin(self, job_id: int, cards: tuple[str, ...], reason: str, now_s: float) -> QueuedJob | None:
        """Give a waiting job its cards; None if it does not wait any more, or a card was given meanwhile."""
        with self._transaction():
            taken = {name for job in self.jobs(RUNNING, LEAVING) for name in job.cards}
            if self.find(job_id).state != WAITING or taken & set(cards):
                return None
            self.make_ready(job_id)
            self._change(
                job_id, state=RUNNING, reason=reason, cards=json.dumps(cards), since_s=now_s,
                step=0, num_steps=0, first_step=0, first_step_s=0, step_s=0,
            )  # fmt: skip
            self._note(cards, f"job {job_id} starts", reason, now_s)
            return self.find(job_id)

    def make_ready(self, job_id: int) -> QueuedJob | None:
        """Give a waiting job a name for Ray, by which its process may start before it has cards; None if it has one, or does not wait."""
        with self._transaction():
            job = self.find(job_id)
            if job.state != WAITING or job.submission:
                return None
            self._change(job_id, submission=f"{SUBMISSION}{job_id}-{secrets.token_hex(4)}", is_submitted=0)
            return self.find(job_id)

    def forget_process(self, job_id: int) -> None:
        """Take its name from a job that waits; the process sees it, and ends."""
        with self._transaction():
            if self.find(job_id).state == WAITING:
                self._change(job_id, submission="", is_submitted=0)

    def mark_submitted(self, job_id: int) -> None:
        """Note that Ray knows of it by its present name."""
        self._change(job_id, is_submitted=1)

    def ask_to_leave(self, job_id: int, reason: str, now_s: float) -> bool:
        """Note that a running job is to leave; whether it was running."""
        with self._transaction():
            job = self.find(job_id)
            if job.state != RUNNING:
                return False
            self._change(job_id, state=LEAVING, reason=reason)
            self._note(job.cards, f"job {job_id} is asked to leave", reason, now_s)
            return True

    def end(self, job_id: int, state: str, reason: str, now_s: float) -> None:
        """Note that a job has left its cards: for good, or to wait again."""
        with self._transaction():
            job = self.find(job_id)
            if job.state not in STANDING:
                return
            state = CANCELLED if job.is_cancelled and state == WAITING else state
            self._change(job_id, state=state, reason=reason, cards="[]", submission="", is_submitted=0, since_s=now_s)
            self._note(job.cards, f"job {job_id} left: {state}", reason, now_s)

    def lose(self, job_id: int, reason: str, max_attempts: int, now_s: float) -> None:
        """Note that a job's process, card or machine was lost: it waits again, unless that happened too often."""
        with self._transaction():
            num_lost = self.find(job_id).num_lost + 1
            self._change(job_id, num_lost=num_lost)
            if num_lost < max_attempts:
                self.end(job_id, WAITING, f"{reason}; it goes on by itself", now_s)
            else:
                self.end(job_id, FAILED, f"{reason}; begun {num_lost} times (lending.max_attempts)", now_s)

    def explain(self, waits: dict[int, str]) -> None:
        """Note why jobs wait, where that is news."""
        news = [(job.id, waits[job.id]) for job in self.jobs(WAITING) if waits.get(job.id, job.reason) != job.reason]
        for job_id, reason in news:
            self._execute("UPDATE jobs SET reason = ? WHERE id = ? AND state = ?", reason, job_id, WAITING)

    def cancel(self, job_id: int, now_s: float | None = None) -> QueuedJob:
        """Take a job out of the line; one that runs saves its state and leaves.

        Raises:
            ClusterError: It has ended, or there is none.
        """
        now_s = time.time() if now_s is None else now_s
        with self._transaction():
            job = self._standing(job_id)
            self._change(job_id, is_cancelled=1)
            if job.state == WAITING:
                self._change(job_id, state=CANCELLED, reason="by the user", since_s=now_s)
            self.ask_to_leave(job_id, "cancelled by the user", now_s)
            return self.find(job_id)

    def move(self, job_id: int, priority: int | None = None, before: int | None = None) -> QueuedJob:
        """Give a job another priority, or the place just before another one, whose priority it gets.

        Raises:
            ClusterError: One of them has ended, or is not there.
        """
        with self._transaction():
            self._standing(job_id)
            if before is not None:
                other = self._standing(before)
                earlier = [job.place for job in self.jobs(*STANDING) if job.place < other.place and job.priority == other.priority]
                self._change(job_id, priority=other.priority, place=(max(earlier, default=other.place - 2) + other.place) / 2)
            if priority is not None:
                self._change(job_id, priority=priority)
            return self.find(job_id)

    def want_memory(self, job_id: int, memory_gib: float) -> None:
        """Let a job have only cards with so much memory from now on."""
        self._change(job_id, memory_gib=memory_gib)

    def handovers(self, count: int) -> list[tuple[float, str, str, str]]:
        """Return the newest handovers: time, card, what, why."""
        rows = self._execute("SELECT at_s, card, what, reason FROM handovers ORDER BY rowid DESC LIMIT ?", count)
        return [(row["at_s"], row["card"], row["what"], row["reason"]) for row in rows]

    def count_handovers(self) -> dict[tuple[str, str], int]:
        """Return how many there ever were, by card and reason, of which there are few here: see `REASONS`."""
        cases = " ".join("WHEN what || ': ' || reason LIKE ? THEN ?" for _ in REASONS)
        values = [word for pair in REASONS.items() for word in pair]
        query = f"SELECT card, CASE {cases} ELSE ? END AS why, COUNT(*) AS num FROM handovers GROUP BY card, why"  # noqa: S608 (our words)
        return {(row["card"], row["why"]): int(row["num"]) for row in self._execute(query, *values, OTHER_REASON)}

    def note_handover(self, card: str, what: str, reason: str, now_s: float) -> None:
        """Note what chat did with a card."""
        self._note((card,), what, reason, now_s)

    def note_run(self, job_id: int, run_id: str) -> None:
        """Note by which run a job goes on."""
        self._change(job_id, run_id=run_id)

    def forget_runs(self) -> None:
        """Let all that stand in line begin anew: their checkpoints are not here."""
        values = "run_id = '', state = ?, cards = '[]', submission = '', is_submitted = 0, step = 0, num_steps = 0"
        marks = ", ".join("?" * len(STANDING))
        self._execute(f"UPDATE jobs SET {values} WHERE state IN ({marks})", WAITING, *STANDING)  # noqa: S608 (our names)

    def note_progress(self, job_id: int, step: int, num_steps: int, now_s: float) -> None:
        """Note how far a job is, from which its end is guessed."""
        with self._transaction():
            job = self.find(job_id)
            first = {} if job.first_step_s else {"first_step": step, "first_step_s": now_s}
            self._change(job_id, step=step, num_steps=num_steps, step_s=now_s, **first)

    def _standing(self, job_id: int) -> QueuedJob:
        job = self.find(job_id)
        if job.state not in STANDING:
            raise ClusterError(f"job {job_id} has ended", f"it is {job.state}: {job.reason}", "python -m cluster queue")
        return job

    def _change(self, job_id: int, **values: Any) -> None:
        settings = ", ".join(f"{name} = ?" for name in values)
        self._execute(f"UPDATE jobs SET {settings} WHERE id = ?", *values.values(), job_id)  # noqa: S608 (our names)

    def _note(self, cards: tuple[str, ...], what: str, reason: str, now_s: float) -> None:
        for card in cards:
            self._execute("INSERT INTO handovers VALUES (?, ?, ?, ?)", now_s, card, what, reason)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Do all of it or nothing; within another transaction, as part of it."""
        if self.connection.in_transaction:
            yield
            return
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def _execute(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        try:
            return self.connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: sqlite3.Error) -> ClusterError:
        remedy = "free space on the disk; or python -m cluster down, and move it away with its -wal and -shm: the jobs in it are forgotten"
        return ClusterError("the queue cannot be read or written", f"{self.file}: {error}", remedy)


def clock(moment_s: float) -> str:
    """Return a moment as people say it: the time, with the day where that is another one."""
    moment = time.localtime(moment_s)
    return time.strftime("%H:%M" if moment[:3] == time.localtime()[:3] else "%b %d %H:%M", moment)


def _job(row: sqlite3.Row) -> QueuedJob:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118 (a Row yields values)
    values["cards"] = tuple(json.loads(values["cards"]))
    return QueuedJob(**{**values, **{name: bool(values[name]) for name in ("is_cancelled", "is_submitted")}})


def note_run(run_id: str) -> None:
    """Tell the queue which run this process trains, if it is one of its jobs."""
    if job_id := os.environ.get(JOB_VARIABLE):
        with closing(Queue()) as queue:
            queue.note_run(int(job_id), run_id)


def note_progress(step: int, num_steps: int) -> None:
    """Tell the queue how far this process is, if it is one of its jobs; it trains on where it cannot."""
    if job_id := os.environ.get(JOB_VARIABLE):
        with suppress(ClusterError), closing(Queue(timeout_s=PROGRESS_TIMEOUT_S)) as queue:
            queue.note_progress(int(job_id), step, num_steps, time.time())
