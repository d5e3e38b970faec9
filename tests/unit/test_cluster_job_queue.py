"""The line of jobs on disk: states, places, and what a second writer sees."""

import time

import pytest

from cluster.job_queue import (
    CANCELLED,
    DONE,
    FAILED,
    JOB_VARIABLE,
    LEAVING,
    RUNNING,
    STANDING,
    WAITING,
    NewJob,
    Queue,
    clock,
    note_progress,
    note_run,
)
from cluster.queue_view import told
from configs.errors import ClusterError


@pytest.fixture
def line(home):
    with Queue() as queue:
        yield queue


def submit(line: Queue, now_s: float = 0.0, **settings) -> int:
    return line.submit(NewJob("train", "helpdesk", "name: helpdesk", **settings), now_s=now_s).id


def in_line(line: Queue) -> list[int]:
    return [job.id for job in sorted(line.jobs(*STANDING), key=lambda job: (-job.priority, job.place))]


def test_a_job_is_kept_as_it_was_submitted(line, home):
    number = submit(line, folder="/work", priority=2, num_cards=2)
    with Queue() as other:
        job = other.find(number)
    assert (job.config, job.folder, job.priority, job.num_cards) == ("name: helpdesk", "/work", 2, 2)
    assert (job.state, job.cards, job.run_id) == (WAITING, (), "")


def test_a_card_is_given_once_whoever_asks(line):
    first, second = submit(line), submit(line)
    with Queue() as other:
        begun = line.begin(first, ("card1",), "it is its turn", 1)
        assert begun.state == RUNNING
        assert other.begin(second, ("card1", "card2"), "it is its turn", 1) is None
        assert other.begin(first, ("card2",), "it is its turn", 1) is None, "it does not wait any more"
        line.end(first, DONE, "", 2)
        assert other.begin(second, ("card1",), "it is its turn", 3).cards == ("card1",)


def test_each_start_has_a_name_of_its_own_and_goes_on_with_the_run(line):
    number = submit(line)
    names = set()
    for moment in (1, 2, 3):
        begun = line.begin(number, ("card1",), "", moment)
        assert not begun.is_submitted
        assert begun.num_steps == 0
        names.add(begun.submission)
        line.mark_submitted(number)
        line.note_run(number, "abc")
        line.ask_to_leave(number, "chat wants card1 back", moment)
        line.end(number, WAITING, "chat wants card1 back", moment)
    assert len(names) == 3
    assert line.find(number).run_id == "abc"


def test_what_is_lost_too_often_has_failed(line):
    number = submit(line)
    for state in (WAITING, WAITING, FAILED):
        line.begin(number, ("card1",), "", 1)
        line.lose(number, "its process was lost", 3, 2)
        assert line.find(number).state == state
    assert "3 times" in line.find(number).reason


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_when_it_has_left(line):
    waiting, running = submit(line), submit(line)
    line.begin(running, ("card1",), "", 1)
    assert line.cancel(waiting).state == CANCELLED
    assert line.cancel(running).state == LEAVING
    line.end(running, WAITING, "cancelled by the user", 2)
    assert line.find(running).state == CANCELLED, "it does not wait again"
    for number in (waiting, running):
        with pytest.raises(ClusterError, match="has ended"):
            line.cancel(number)
    with pytest.raises(ClusterError, match="there is no job 99"):
        line.cancel(99)


def test_a_job_is_moved_before_another_and_takes_its_priority(line):
    first, second, third, fourth = (submit(line, now_s=moment, priority=priority) for moment, priority in enumerate((0, 0, 1, 0)))
    assert in_line(line) == [third, first, second, fourth]
    line.move(fourth, before=second)
    assert in_line(line) == [third, first, fourth, second]
    line.move(second, before=third)
    assert in_line(line) == [second, third, first, fourth]
    assert line.find(second).priority == 1
    line.move(third, priority=-1)
    assert in_line(line) == [second, first, fourth, third]


def test_the_end_is_guessed_from_the_pace_since_it_started(line, monkeypatch):
    number = submit(line)
    line.begin(number, ("card1",), "", 0)
    assert line.find(number).ends_s() is None
    line.note_progress(number, 40, 100, 10.0)
    assert line.find(number).ends_s() is None, "one point is no pace"
    line.note_progress(number, 60, 100, 30.0)
    assert line.find(number).ends_s() == 70.0


def test_a_sweep_tells_how_far_it_is_and_its_end_where_it_can(line):
    number = line.submit(NewJob("sweep", "helpdesk", "name: helpdesk")).id
    line.begin(number, ("card1",), "card1 was free", 0)
    assert told(line.find(number)) == "card1 was free"
    line.note_progress(number, 40, 0, 10.0)
    line.note_progress(number, 130, 0, 40.0)
    assert told(line.find(number)) == "card1 was free · 1.3 times a run's training so far"
    line.note_progress(number, 160, 300, 50.0)
    assert told(line.find(number)) == f"card1 was free · about 53% of its training · until about {clock(50.0 + 140 * 40 / 120)}"


def test_a_moment_of_another_day_is_told_with_the_day():
    noon = time.mktime((*time.localtime()[:3], 12, 0, 0, 0, 0, -1))
    assert clock(noon) == "12:00"
    assert clock(noon + 24 * 3600).endswith(" 12:00")
    assert len(clock(noon + 24 * 3600)) == len("Nov 24 12:00")


def test_a_process_tells_of_itself_only_where_it_is_a_job(line, monkeypatch):
    number = submit(line)
    note_run("abc")
    note_progress(1, 2)
    assert line.find(number).run_id == ""
    monkeypatch.setenv(JOB_VARIABLE, str(number))
    note_run("abc")
    note_progress(1, 2)
    assert (line.find(number).run_id, line.find(number).step, line.find(number).num_steps) == ("abc", 1, 2)


def test_progress_that_cannot_be_told_does_not_disturb_the_training(line, home, monkeypatch):
    number = submit(line)
    monkeypatch.setenv(JOB_VARIABLE, str(number))
    line.connection.execute("BEGIN IMMEDIATE")
    note_progress(1, 2)
    line.connection.execute("ROLLBACK")
    assert line.find(number).step == 0


def test_a_handover_is_told_with_its_reason(line):
    number = submit(line)
    line.begin(number, ("card0",), "card0 is lent by chat", 5)
    line.ask_to_leave(number, "chat wants card0 back", 6)
    assert line.handovers(1) == [(6, "card0", f"job {number} is asked to leave", "chat wants card0 back")]


@pytest.mark.parametrize("is_cut", [False, True], ids=["another file", "cut short"])
def test_a_file_that_is_no_queue_is_one_clear_error(is_cut, home, command):
    home.mkdir(parents=True, exist_ok=True)
    with Queue() as line:
        submit(line)
    file = home / "queue.db"
    file.write_bytes(file.read_bytes()[:6000] if is_cut else b"not a database" * 100)
    for words in (["queue"], ["cancel", "1"], ["move", "1", "--priority", "2"]):
        refused = command("cluster", *words)
        assert (refused.status, refused.out) == (2, "")
        assert refused.err.startswith(f"error: the queue cannot be read or written\n{file}: ")
        assert "python -m cluster down, and move it away" in refused.err
    assert command("cluster", "down").status == 0
