"""Who may use a card: the rule by itself, and under a simulator of arrivals, jobs and deaths, with the real arbiter and queue."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.job_queue import DONE, FAILED, STANDING
from configs.schema import LendingConfig
from tests.helpers.simulator import LEAVE_WITHIN_S, RELEASE_S, START_S, Setting, Simulation

HOURS_S = 3600

settings_of_a_cluster = st.builds(
    Setting,
    num_serve=st.integers(1, 2),
    num_train=st.integers(1, 2),
    min_engines=st.integers(0, 1),
    max_engines=st.integers(1, 3),
    uses_train_cards=st.booleans(),
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
    st.integers(-1, 1), st.sampled_from([1, 1, 1, 2]), st.sampled_from([0, 0, 32]),
)  # fmt: skip
happenings = st.one_of(
    jobs,
    jobs,
    st.tuples(st.just("arrive"), st.sampled_from([1, 400, 9000, 40000])),
    st.tuples(st.just("arrive"), st.sampled_from([1, 9000])),
    st.tuples(st.just("kill_run")),
    st.tuples(st.just("kill_engine")),
    st.tuples(st.just("kill_raylet"), st.integers(0, 3), st.integers(1, 20)),
    st.tuples(st.just("kill_head"), st.integers(1, 20)),
    st.tuples(st.just("kill_arbiter"), st.integers(1, 14), st.integers(0, 6)),
    st.tuples(st.just("hang"), st.booleans()),
    st.tuples(st.just("occupy")),
    st.tuples(st.just("leave_foreign")),
)
stories = st.lists(st.tuples(happenings, st.sampled_from([0, 1, 2, 5, 10, 25, 40])), min_size=8, max_size=30)


def live_through(simulation: Simulation, story: list[tuple[tuple[Any, ...], int]]) -> None:
    for (what, *values), pause_s in story:
        if what == "hang":
            simulation.leave_s = 10 * LEAVE_WITHIN_S if values[0] else 2.0
        else:
            getattr(simulation, what)(*values)
        simulation.run(pause_s)


def standing(simulation: Simulation) -> list[int]:
    return [job.id for job in simulation.queue.jobs(*STANDING)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(settings_of_a_cluster, stories)
def test_whatever_happens_chat_is_answered_no_card_is_held_twice_and_all_jobs_come_to_their_end(setting, story):
    """The simulator itself looks at each second; here at the end."""
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
