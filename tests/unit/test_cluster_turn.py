"""A process that was started before its turn: it goes on with its cards, or ends."""

import os
import threading
import time

import pytest

from cluster.job_queue import FAILED, JOB_VARIABLE, NewJob, Queue, QueuedJob
from cluster.placement import CARDS_VARIABLE, given_cards
from cluster.turn import EARLY_VARIABLE, is_early, likely_card, wait_for_turn
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


def test_the_card_that_it_will_get_is_the_first_that_chat_may_lend_and_is_large_enough(early):
    def labels(card: str, pool: str, memory_gib: float) -> dict[str, str]:
        return {"card": card, "pool": pool, "memory-gib": str(memory_gib)}

    cards = [labels("card0", "train", 32), labels("card1", "serve", 16), labels("card2", "serve", 16)]
    assert likely_card(cards)["card"] == "card1"
    with Queue() as queue:
        other = queue.submit(NewJob("train", "helpdesk", "name: helpdesk"))
        queue.begin(other.id, ("card1",), "it is its turn", 1.0)
        assert likely_card(cards)["card"] == "card2"
        queue.begin(early.id, ("card2",), "it is its turn", 1.0)
        assert likely_card(cards)["card"] == "card2", "its turn came"
    assert likely_card(cards[:2]) is None
    assert likely_card([labels("card3", "serve", 0.5)])["card"] == "card3"


def test_a_card_that_is_too_small_is_not_waited_at(home, monkeypatch):
    with Queue() as queue:
        job = queue.submit(NewJob("train", "helpdesk", "name: helpdesk", memory_gib=20))
    monkeypatch.setenv(JOB_VARIABLE, str(job.id))
    assert likely_card([{"card": "card0", "pool": "serve", "memory-gib": "16"}]) is None
