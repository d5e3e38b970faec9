"""Submitting to the line of jobs, and the line as a table.

Knows configs and what the line holds. Does not know how a job is run.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from cluster.job_queue import LEAVING, RUNNING, STANDING, NewJob, Queue, QueuedJob, clock
from cluster.rule import RANKS, SERVE
from cluster.session import Session
from configs.errors import ClusterError
from configs.loader import chatbot_source, load_chatbot
from configs.schema import LendingConfig
from configs.space import load_sweep

NUM_ENDED = 8


def check_job(config: str, overrides: Sequence[str], is_sweep: bool, session: Session | None) -> NewJob:
    """Read what is submitted, and refuse what could never run.

    Raises:
        ConfigError: The config is wrong.
        ClusterError: It wants more cards than there are.
    """
    settings = load_sweep(config, overrides) if is_sweep else load_chatbot(config, overrides)
    num_cards = 1 if is_sweep else settings.train.num_workers
    if session:
        lends = LendingConfig.model_validate(session.machine.get("lending", {})).enabled
        num_usable = sum(card["pool"] != SERVE or lends for card in session.cards)
        if num_cards > num_usable:
            why = f"the cluster has {num_usable} that training may use; it would wait for ever"
            raise ClusterError(f"train.num_workers={num_cards} wants as many cards", why, f"train.num_workers={max(1, num_usable)}")
    text = yaml.safe_dump(chatbot_source(config, overrides).values, sort_keys=False, allow_unicode=True)
    return NewJob("sweep" if is_sweep else "train", settings.name, text, str(Path.cwd()), num_cards=num_cards)


def queue_table(queue: Queue) -> Table:
    """Show who runs, who waits and why, in the order of the line, and the last that ended."""
    table = Table("job", "kind", "chatbot", "priority", "state", "since", "cards", "reason", box=None, pad_edge=False)
    standing = sorted(
        queue.jobs(*STANDING), key=lambda job: (job.state not in (RUNNING, LEAVING), RANKS[job.kind], -job.priority, job.place)
    )
    ended = [job for job in queue.jobs() if job.state not in STANDING]
    for job in [*standing, *sorted(ended, key=lambda job: -job.since_s)[:NUM_ENDED]]:
        since = time.strftime("%H:%M:%S", time.localtime(job.since_s))
        table.add_row(str(job.id), job.kind, job.chatbot, str(job.priority), job.state, since, ", ".join(job.cards), told(job))
    return table


def told(job: QueuedJob) -> str:
    """Return why a job is in its state, and of one that runs how far it is."""
    parts = [job.reason or "not looked at yet"]
    if job.state == RUNNING and job.num_steps:
        parts.append(f"step {job.step}/{job.num_steps}")
    if ends_s := job.ends_s():
        parts.append(f"until about {clock(ends_s)}")
    return " · ".join(part for part in parts if part)
