"""A process that was started before its turn: it goes on with its cards, or ends."""

import os
import threading
import time

import pytest

from cluster.job_queue import FAILED, JOB_VARIABLE, NewJob, Queue, QueuedJob
from cluster.placement import CARDS_VARIABLE, given_cards
from cluster.turn import EARLY_VARIABLE, is_early, wait_for_turn
from configs.errors import EXIT_STOPPED


@pytest.fixture
def early(home, monkeypatch) -> QueuedJob:
    """A job that waits, which this process is of."""
    with Queue() as queue:
        job = queue.make_ready(queue.submit(NewJob("train", "helpdesk", "name: helpdesk")).id)
        assert queue.make_ready(job.id) is None, "one process is enough"
    monkeypatch.setenv(JOB_VARIABLE, str(job.id))
    monkeypatch.setenv(EARLY_VARIABLE, job.submission)
    monkeypatch.setenv(CARDS_VARIABLE, "")
    return job


def test_it_waits_for_its_cards_and_has_the_name_that_it_was_started_by(early):
    def begin() -> None:
        time.sleep(0.3)
        with Queue() as queue:
            queue.begin(early.id, ("card0", "card1"), "it is its turn", 1.0)

    arbiter = threading.Thread(target=begin)
    arbiter.start()
    wait_for_turn()
    arbiter.join()
    assert given_cards() == ["card0", "card1"]
    assert not is_early()
    with Queue() as queue:
        assert queue.find(early.id).submission == early.submission


@pytest.mark.parametrize(
    "change",
    [
        lambda queue, job: queue.cancel(job),
        lambda queue, job: queue.forget_process(job),
        lambda queue, job: queue.end(job, FAILED, "its config is bad", 1.0),
        lambda queue, job: queue.forget_process(job) or queue.make_ready(job),
    ],
)
def test_it_ends_where_it_is_not_wanted_any_more(early, change):
    with Queue() as queue:
        change(queue, early.id)
    with pytest.raises(SystemExit) as ended:
        wait_for_turn()
    assert ended.value.code == EXIT_STOPPED
    assert os.environ[CARDS_VARIABLE] == ""
