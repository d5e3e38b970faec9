"""Who may use a card: the rule by itself, and under a simulator of arrivals, jobs and deaths, with the real arbiter and queue."""

import os
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.job_queue import DONE, FAILED, STANDING
from cluster.job_queue import RUNNING as RUNNING_STATE
from cluster.job_queue import WAITING as WAITING_STATE
from cluster.queue_view import told
from cluster.rule import ASLEEP_WITHIN_S, Card, Chat, Decision, Job, Leave, Snapshot, Start, decide
from configs.schema import LendingConfig
from tests.helpers.simulated import LEAVE_WITHIN_S, RELEASE_S, START_S, Setting
from tests.helpers.simulator import Simulation

HOURS_S = 3600
NUM_STORIES = int(os.environ.get("NUM_STORIES", "40"))  # a thousand take a minute

LENDING = LendingConfig(enabled=True, quiet_after_s=60, min_hold_s=30)
OFF = LendingConfig(enabled=False, quiet_after_s=60, min_hold_s=30)
SERVE_CARD, TRAIN_CARD = Card("card0", "serve"), Card("card1", "train")
ANSWERING = Card("card0", "serve", engine_since_s=0)
BUSY_CHAT = Chat(min_engines=1, max_engines=1, num_wanted=1, quiet_s=5)
QUIET_CHAT = Chat(min_engines=1, max_engines=1, num_wanted=1, quiet_s=60)
RUNNING = Job(1, "train", "running", cards=("card1",), since_s=900, ends_at="14:20")
LENT = Job(2, "sweep", "running", cards=("card0",), since_s=990)
WAITING = Job(3, "train")


def decided(*jobs: Job, cards: tuple[Card, ...], chat: Chat = BUSY_CHAT, lending: LendingConfig = LENDING) -> Decision:
    return decide(Snapshot(1000, cards, chat, jobs), lending)


def test_a_job_waits_with_the_reason_and_the_time():
    found = decided(RUNNING, WAITING, cards=(ANSWERING, TRAIN_CARD))
    assert found.actions == ()
    assert found.waits == {3: "card0 answers chat; card1 busy with job 1 until about 14:20"}
    off = decided(RUNNING, WAITING, cards=(ANSWERING, TRAIN_CARD), lending=OFF)
    assert off.waits == {3: "card1 busy with job 1 until about 14:20"}


def test_quiet_chat_sends_its_engine_to_sleep_only_where_a_job_waits_for_the_card():
    assert decided(RUNNING, cards=(ANSWERING, TRAIN_CARD), chat=QUIET_CHAT).num_engines == (1, 1)
    found = decided(RUNNING, WAITING, cards=(ANSWERING, TRAIN_CARD), chat=QUIET_CHAT)
    assert (found.num_engines, found.waits) == ((0, 1), {3: "card0 is given back by chat; card1 busy with job 1 until about 14:20"})
    gone = replace(QUIET_CHAT, num_wanted=0)
    (start,) = decided(RUNNING, WAITING, cards=(SERVE_CARD, TRAIN_CARD), chat=gone).actions
    assert start == Start(3, ("card0",), "card0 is lent by chat, which does not need it")
    assert decided(RUNNING, WAITING, cards=(ANSWERING, TRAIN_CARD), chat=QUIET_CHAT, lending=OFF).num_engines == (1, 1)


def test_an_engine_that_can_sleep_is_told_to_and_none_is_ended():
    seated = replace(ANSWERING, is_seated=True, is_answering=True)
    found = decided(RUNNING, WAITING, cards=(seated, TRAIN_CARD), chat=QUIET_CHAT)
    start = Start(3, ("card0",), "card0 is lent by chat, which does not need it")
    assert (found.bedtimes, found.num_engines, found.actions) == (("card0",), (1, 1), (start,)), "its process gets ready meanwhile"
    other = Card("card9", "serve", engine_since_s=0)
    found = decided(RUNNING, replace(WAITING, num_cards=2), cards=(seated, other, TRAIN_CARD), chat=QUIET_CHAT)
    assert (found.bedtimes, found.actions) == (("card0",), ()), "the other one must end, and may be begun anew on either card"
    asleep, nobody = replace(seated, engine_since_s=None), replace(QUIET_CHAT, num_wanted=0)
    found = decided(RUNNING, WAITING, cards=(asleep, TRAIN_CARD), chat=nobody)
    assert (found.actions[0].cards, found.num_engines, found.bedtimes) == (("card0",), (1, 1), ())
    found = decided(RUNNING, LENT, cards=(asleep, TRAIN_CARD), chat=nobody)
    assert (found.actions, found.num_engines) == ((), (1, 1)), "it sleeps on"
    called = replace(asleep, is_called=True)
    found = decided(RUNNING, LENT, cards=(called, TRAIN_CARD), chat=BUSY_CHAT)
    assert found.actions == (Leave(2, "chat wants card0 back: an engine waits for it"),)
    found = decided(LENT, WAITING, cards=(called, Card("card9", "serve")), chat=BUSY_CHAT)
    assert [action.job for action in found.actions] == [2, 3], "no other card would do; the other one is free for the next job"
    assert decided(RUNNING, WAITING, cards=(seated, TRAIN_CARD)).bedtimes == (), "chat is not quiet"
    woken = decided(RUNNING, LENT, cards=(seated, TRAIN_CARD), chat=QUIET_CHAT)
    assert woken.bedtimes == ("card0",), "it woke before the job's process had the card, and would keep it from the job for ever"
    (leave,) = decided(RUNNING, LENT, cards=(seated, TRAIN_CARD)).actions
    assert leave == Leave(2, "chat has requests again, and its engine did not fall asleep")
    assert decided(RUNNING, LENT, cards=(replace(seated, is_answering=False), TRAIN_CARD)).actions == (), "it begins, and may not want it"
    late = replace(LENT, since_s=1000 - ASLEEP_WITHIN_S - 1)
    (leave,) = decided(RUNNING, late, cards=(seated, TRAIN_CARD), chat=QUIET_CHAT).actions
    assert leave == Leave(2, "the engine on its card did not fall asleep within 60 s")
    leaving = replace(LENT, state="leaving")
    assert decided(RUNNING, leaving, cards=(seated, TRAIN_CARD), chat=QUIET_CHAT).bedtimes == (), "a job that leaves needs no card"


def test_the_first_that_waits_for_a_card_that_chat_may_lend_may_get_ready():
    behind, sweep = Job(4, "train", place=1), Job(5, "sweep", place=-1)
    assert decided(RUNNING, behind, sweep, WAITING, cards=(ANSWERING, TRAIN_CARD)).next_job == 3
    assert decided(RUNNING, WAITING, cards=(ANSWERING, TRAIN_CARD), lending=OFF).next_job is None, "it may wait for days"
    assert decided(WAITING, cards=(ANSWERING, TRAIN_CARD)).next_job is None, "it starts"


def test_a_request_calls_the_lent_card_back_at_once_and_nobody_else_gets_it():
    chat = replace(BUSY_CHAT, quiet_s=0)
    found = decided(RUNNING, LENT, WAITING, cards=(SERVE_CARD, TRAIN_CARD), chat=chat)
    assert found.actions == (Leave(2, "chat wants card0 back: an engine waits for it"),)
    leaving = replace(LENT, state="leaving")
    found = decided(RUNNING, leaving, WAITING, cards=(SERVE_CARD, TRAIN_CARD), chat=chat)
    assert found.actions == ()
    assert found.waits[3].startswith("card0 busy with job 2, asked to leave; card1 busy with job 1")
    found = decided(RUNNING, WAITING, cards=(SERVE_CARD, TRAIN_CARD), chat=chat)
    assert (found.actions, found.waits[3].partition(";")[0]) == ((), "card0 is kept for chat")


def test_a_job_makes_room_for_one_that_ranks_above_it_but_not_before_its_time():
    urgent = replace(WAITING, priority=1)
    for since_s, expected in ((970, (Leave(1, "job 3 goes before it", for_job=3),)), (971, ())):
        assert decided(replace(RUNNING, since_s=since_s), urgent, cards=(ANSWERING, TRAIN_CARD)).actions == expected
    assert decided(replace(RUNNING, since_s=0), WAITING, cards=(ANSWERING, TRAIN_CARD)).actions == (), "age alone moves nobody"
    sweep = replace(RUNNING, kind="sweep", priority=9)
    assert decided(sweep, WAITING, cards=(ANSWERING, TRAIN_CARD)).actions == (Leave(1, "job 3 goes before it", for_job=3),)


def test_an_engine_may_be_a_guest_on_an_idle_train_card_until_training_wants_it():
    chat = Chat(1, 3, uses_train_cards=True, num_wanted=2, quiet_s=0)
    assert decided(cards=(ANSWERING, TRAIN_CARD), chat=chat).num_engines == (1, 2)
    guest = replace(TRAIN_CARD, engine_since_s=900)
    found = decided(WAITING, cards=(ANSWERING, guest), chat=chat)
    assert (found.num_engines, found.waits) == ((1, 1), {3: "card0 answers chat; card1 is given back by chat"})
    found = decided(WAITING, cards=(ANSWERING, replace(guest, engine_since_s=980)), chat=chat)
    assert (found.num_engines, found.waits) == ((1, 2), {3: "card0 answers chat; card1 answers chat"}), "not before its time"


def test_a_job_that_wants_two_cards_keeps_the_first_free_one_and_a_sweep_takes_all_train_cards():
    cards = (ANSWERING, TRAIN_CARD, Card("card2", "train"))
    two = replace(WAITING, num_cards=2)
    behind = Job(4, "train", place=1)
    found = decided(RUNNING, two, behind, cards=cards, lending=OFF)
    assert found.actions == ()
    assert found.waits[4] == "card1 busy with job 1 until about 14:20; card2 is kept for job 3"
    (start,) = decided(Job(5, "sweep"), cards=cards).actions
    assert start.cards == ("card1", "card2")
    assert decided(replace(two, num_cards=3), cards=cards, lending=OFF).waits[3] == "it needs 3 cards, and there are 2"


def test_an_engine_stays_where_the_job_that_makes_room_has_cards_enough():
    cards = (ANSWERING, TRAIN_CARD, Card("card2", "train"))
    wide, urgent = replace(RUNNING, num_cards=2, cards=("card1", "card2")), replace(WAITING, num_cards=2, priority=1)
    found = decided(wide, urgent, cards=cards, chat=QUIET_CHAT)
    assert (found.actions, found.num_engines) == ((Leave(1, "job 3 goes before it", for_job=3),), (1, 1))
    found = decided(wide, replace(urgent, num_cards=3), cards=cards, chat=QUIET_CHAT)
    assert (found.actions, found.num_engines) == ((Leave(1, "job 3 goes before it", for_job=3),), (0, 1))


def test_a_card_with_too_little_memory_is_not_lent():
    small = Card("card0", "serve", memory_gib=16)
    large = replace(WAITING, memory_gib=24)
    assert decided(RUNNING, large, cards=(small, TRAIN_CARD), chat=Chat()).actions == ()
    assert decided(RUNNING, WAITING, cards=(small, TRAIN_CARD), chat=Chat()).actions[0].cards == ("card0",)


settings_of_a_cluster = st.builds(
    Setting,
    num_serve=st.integers(1, 2),
    num_train=st.integers(1, 2),
    min_engines=st.integers(0, 1),
    max_engines=st.integers(1, 3),
    uses_train_cards=st.booleans(),
    can_sleep=st.booleans(),
    engines_first=st.booleans(),
    num_idle_cores=st.sampled_from([1, 16]),
    lending=st.builds(
        LendingConfig,
        enabled=st.sampled_from([True, True, True, False]),
        quiet_after_s=st.sampled_from([0, 3, 15]),
        min_hold_s=st.sampled_from([0, 10, 30]),
        max_attempts=st.just(3),
    ),
)
jobs = st.tuples(
    st.just("submit_job"), st.sampled_from(["train", "sweep"]), st.sampled_from([5, 30, 90, 200]),
    st.integers(-1, 1), st.sampled_from([1, 1, 1, 2]), st.sampled_from([0, 0, 32]), st.sampled_from([0, 32]),
)  # fmt: skip
happenings = st.one_of(
    jobs,
    jobs,
    st.tuples(st.just("arrive"), st.sampled_from([400, 9000, 100_000])),
    st.tuples(st.just("arrive"), st.sampled_from([1, 9000])),
    st.tuples(st.just("rush"), st.sampled_from([100, 7000]), st.sampled_from([5, 15])),
    st.tuples(st.just("kill_run")),
    st.tuples(st.just("kill_engine")),
    st.tuples(st.just("kill_raylet"), st.integers(0, 3), st.integers(1, 20)),
    st.tuples(st.just("kill_head"), st.integers(1, 20)),
    st.tuples(st.just("kill_arbiter"), st.integers(1, 14), st.integers(0, 6)),
    st.tuples(st.just("hang"), st.booleans()),
    st.tuples(st.just("occupy")),
    st.tuples(st.just("leave_foreign")),
)
stories = st.lists(st.tuples(happenings, st.sampled_from([0, 1, 2, 5, 10, 25, 60])), min_size=8, max_size=20)


def live_through(simulation: Simulation, story: list[tuple[tuple[Any, ...], int]]) -> None:
    for (what, *values), pause_s in story:
        if what == "hang":
            simulation.leave_s = 10 * LEAVE_WITHIN_S if values[0] else 2.0
        else:
            getattr(simulation, what)(*values)
        simulation.run(pause_s)


def standing(simulation: Simulation) -> list[int]:
    return [job.id for job in simulation.queue.jobs(*STANDING)]


@settings(max_examples=NUM_STORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(settings_of_a_cluster, stories)
def test_whatever_happens_chat_is_answered_no_card_is_held_twice_and_all_jobs_come_to_their_end(setting, story):
    """The laws are looked at each second; here at the end."""
    simulation = Simulation(setting)
    live_through(simulation, story)
    simulation.leave_foreign()
    simulation.leave_s = 2.0
    for _ in range(100):
        if not standing(simulation) and not simulation.waiting:
            break
        simulation.run(60)
    assert not standing(simulation), "jobs are left that nobody runs"
    assert not simulation.waiting
    for job in simulation.queue.jobs():
        assert (job.state, job.num_lost == setting.lending.max_attempts) in ((DONE, False), (FAILED, True)), job
        assert job.state == FAILED or simulation.work[job.id] <= 0, "it is done, and was trained to its end"


def test_an_arbiter_may_be_killed_at_each_of_its_words_and_deeds_while_a_lent_card_is_called_back():
    for num_calls in range(1, 40):
        simulation = Simulation(Setting())
        for _ in range(2):
            simulation.submit_job("train", 100)
        simulation.run(45)
        assert any(job.cards == ("serve0",) for job in simulation.queue.jobs(RUNNING_STATE)), "one is lent"
        simulation.kill_arbiter(num_calls, 3)
        simulation.arrive(10)
        simulation.run(60)
        assert not simulation.waiting
        simulation.run(300)
        assert not standing(simulation)


def test_the_job_that_is_next_has_its_process_before_its_cards_and_no_other_has():
    simulation = Simulation(Setting())
    simulation.submit_job("train", 500)
    simulation.rush(100, 5)
    second = simulation.submit_job("train", 50)
    simulation.rush(100, 5)
    assert simulation.queue.find(second.id).submission == "", "not while chat is at work"
    simulation.run(5)
    early = simulation.queue.find(second.id)
    assert (early.state, early.cards, list(simulation.runs).count(early.submission)) == (WAITING_STATE, (), 1)
    urgent = simulation.submit_job("train", 5, priority=1)
    simulation.arbiter.lending = LendingConfig(enabled=True, quiet_after_s=10, min_hold_s=1000)  # it gets nobody's card
    simulation.rush(100, 1)
    simulation.run(5)
    assert early.submission not in simulation.runs, "another one is next"
    next_one = simulation.queue.find(urgent.id).submission
    assert next_one in simulation.runs
    simulation.run(15)
    lent = simulation.queue.find(urgent.id)
    assert (lent.cards, lent.submission) == (("serve0",), next_one)
    assert simulation.queue.find(second.id).submission in simulation.runs


def test_where_cores_are_idle_a_process_gets_ready_while_chat_is_at_work():
    simulation = Simulation(Setting(num_idle_cores=16))
    simulation.submit_job("train", 500)
    simulation.rush(100, 5)
    second = simulation.submit_job("train", 50)
    simulation.rush(100, 2)
    assert simulation.queue.find(second.id).submission in simulation.runs
    assert simulation.queue.find(second.id).cards == ()


def test_a_process_that_is_lost_before_its_turn_costs_its_job_nothing(caplog):
    simulation = Simulation(Setting())
    simulation.submit_job("train", 500)
    simulation.rush(100, 5)
    second = simulation.submit_job("train", 5)
    simulation.run(8)
    early = simulation.queue.find(second.id)
    simulation._lose(early.submission, simulation.runs[early.submission])
    simulation.run(3)
    found = simulation.queue.find(second.id)
    assert (found.state, found.submission, found.num_lost, found.since_s) == (WAITING_STATE, "", 0, early.since_s)
    simulation.run(60)
    assert second.id not in standing(simulation), "it was begun when it had its card"


def test_a_job_that_always_dies_is_begun_three_times_and_the_next_one_runs(caplog):
    simulation = Simulation(Setting())
    doomed, other = simulation.submit_job("train", 60), simulation.submit_job("train", 5)
    for _ in range(6):
        simulation.run(7)
        if doomed.id in standing(simulation):
            simulation.kill_run()
    simulation.run(30)
    found = simulation.queue.find(doomed.id)
    assert (found.state, found.num_lost) == (FAILED, 3)
    assert "begun 3 times (lending.max_attempts)" in found.reason
    assert simulation.queue.find(other.id).state == DONE
    (told_in_log,) = [record.fields for record in caplog.records if record.getMessage() == f"job {doomed.id} failed"]
    assert told_in_log["last_lines"].startswith("  the last lines of ")
    assert told_in_log["remedy"] == "mend the reason, then python -m cluster submit CONFIG"
    assert f"python -m cluster logs system --find 'job {doomed.id} failed'" in told(found)


def test_a_job_that_does_not_fit_the_card_it_got_waits_for_a_larger_one():
    """It was reckoned for short rows as it was submitted; its own are longer."""
    simulation = Simulation(Setting(lending=LendingConfig(enabled=True, quiet_after_s=0, min_hold_s=0), max_engines=0, min_engines=0))
    first = simulation.submit_job("train", 60)
    simulation.run(5)
    assert simulation.queue.find(first.id).cards == ("train0",)
    long = simulation.submit_job("train", 5, 0, 1, 0, 32)
    simulation.run(5)
    found = simulation.queue.find(long.id)
    assert (found.state, found.memory_gib) == ("waiting", 32), "it was lent the smaller one, and came back"
    assert "it waits for a card of 32 GiB" in next(what[-1] for what in simulation.queue.handovers(9))
    simulation.run(90)
    assert simulation.queue.find(long.id).state == DONE


def test_a_job_that_fits_no_card_fails_with_its_own_words():
    simulation = Simulation(Setting())
    job = simulation.submit_job("train", 5)
    simulation.needs_gib[job.id] = 64
    simulation.run(10)
    found = simulation.queue.find(job.id)
    assert (found.state, found.reason.startswith("the words of ")) == (FAILED, True)


def test_thousands_of_requests_a_second_for_ten_minutes_beside_a_line_of_jobs():
    """Bursts and quiet in turn: every burst is answered within the bound, and the lent card adds training."""
    steps = {}
    for enabled in (True, False):
        lending = LendingConfig(enabled=enabled, quiet_after_s=10, min_hold_s=20)
        simulation = Simulation(Setting(max_engines=2, lending=lending))
        for _ in range(4):
            simulation.submit_job("train", 10 * HOURS_S)
        for _ in range(10):
            for _ in range(20):
                simulation.arrive(4000)
                simulation.run(1)
            simulation.run(40)
        assert simulation.num_answered == 10 * 20 * 4000
        steps[enabled] = sum(10 * HOURS_S - left for left in simulation.work.values())
        assert simulation.longest_wait_s <= LEAVE_WITHIN_S + RELEASE_S + START_S + 20 * 4000 / 5000 + 2
        if not enabled:
            assert simulation.longest_wait_s <= START_S + 2, "no engine ever sleeps"
    assert steps[True] > 1.3 * steps[False]


def test_a_job_whose_card_an_engine_took_as_it_began_anew_goes_on_elsewhere():
    simulation = Simulation(
        Setting(
            num_serve=1,
            num_train=1,
            min_engines=1,
            max_engines=1,
            uses_train_cards=True,
            can_sleep=False,
            engines_first=True,
            lending=LendingConfig(enabled=True, quiet_after_s=0.0, min_hold_s=0.0),
        )
    )
    submit = ("submit_job", "train", 5, 0, 1, 0)
    live_through(simulation, [*[(submit, 0)] * 6, (("kill_run",), 1), (("kill_raylet", 0, 2), 0)])
    simulation.run(600)
    assert not standing(simulation)
