"""A job's process that was started before its turn: it waits until the queue has cards for it, or does not want it any more.

Knows the queue, and how cards are told to a process. Does not know what the process does meanwhile.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from cluster.job_queue import LEAVING, RUNNING, STANDING, Queue
from cluster.placement import CARDS_VARIABLE
from cluster.rule import SERVE
from configs.cli import JOB_VARIABLE
from configs.errors import EXIT_STOPPED, ClusterError

EARLY_VARIABLE = "TANDEM_EARLY"
"""Tells a process that it has no cards yet; it holds the name of its submission."""
LOOK_EVERY_S = 0.1


def is_early() -> bool:
    """Whether this process was started before its turn."""
    return EARLY_VARIABLE in os.environ


def likely_card(cards: Iterable[Mapping[str, str]]) -> Mapping[str, str] | None:
    """Return the labels of the card that chat will lend to this process's job, by what is known now; None where all are held."""
    with Queue() as queue:
        mine = queue.find(int(os.environ[JOB_VARIABLE]))
        held = {name for job in queue.jobs(RUNNING, LEAVING) for name in job.cards if job.id != mine.id}
    lent = (card for card in cards if card["pool"] == SERVE and card["card"] not in held)
    return next((card for card in lent if float(card["memory-gib"]) >= mine.memory_gib), None)


def wait_for_turn() -> None:
    """Wait for this process's cards; end it where its job was cancelled, or another is the next one."""
    submission, job_id = os.environ.pop(EARLY_VARIABLE), int(os.environ[JOB_VARIABLE])
    with Queue() as queue:
        while True:
            with suppress(ClusterError):  # somebody writes for long, or the disk is full
                job = next((job for job in queue.jobs(*STANDING) if job.id == job_id and job.submission == submission), None)
                if job is None:
                    sys.exit(EXIT_STOPPED)
                if job.cards:
                    os.environ[CARDS_VARIABLE] = ",".join(job.cards)
                    return
            time.sleep(LOOK_EVERY_S)
