"""What must always be true in a simulated cluster, looked at each second; `AssertionError` where it is not.

Knows the world of `tests.helpers.simulator` from outside. Does not know the rule that is to bring it about.
"""

from typing import TYPE_CHECKING

from cluster.job_queue import LEAVING, RUNNING, STANDING, WAITING, QueuedJob
from cluster.rule import RANKS, SERVE, TRAIN
from tests.helpers.simulated import LEAVE_WITHIN_S, RELEASE_S, START_S, Engine, Run, Spot

if TYPE_CHECKING:
    from tests.helpers.simulator import Simulation

SLACK_S = 4.0


class Laws:
    """The laws of one world, and since when one of them is about to be broken."""

    def __init__(self, world: "Simulation") -> None:
        self.world = world
        self.outranked_since_s: dict[int, float] = {}
        self.wanted_since_s: dict[str, float] = {}
        self.lacking_since_s = 0.0

    def check(self) -> None:
        held = [name for job in self.world.queue.jobs(RUNNING, LEAVING) for name in job.cards]
        assert len(held) == len(set(held)), f"a card is held twice: {held}"
        if not self.world.setting.lending.enabled:
            assert not [name for name in held if name.startswith(SERVE)], "a serve card is lent where none is to be"
        for spot in self.world.spots:
            if isinstance(spot.occupant, Run):
                assert spot.card.name in spot.occupant.job.cards, "a job is on a card that it was not given"
        self._check_chat()

    def _check_chat(self) -> None:
        """No request waits longer than it takes to call a card back and to start an engine there, and for those before it."""
        if not any(spot.card.pool == SERVE and self.world.is_alive(spot) for spot in self.world.spots):
            self.world.disturb(START_S)
        if self.world.waiting:
            arrived_s, _, backlog_s = self.world.waiting[0]
            wait_s = self.world.now_s - max(arrived_s, self.world.undisturbed_since_s)
            limit_s = LEAVE_WITHIN_S + RELEASE_S + START_S + SLACK_S + backlog_s
            assert wait_s <= limit_s, f"a request waits for {wait_s} s, and {limit_s} s would do"
        lent = [
            spot for spot in self.world.spots if spot.card.pool == SERVE and isinstance(spot.occupant, Run) and self.world.is_alive(spot)
        ]
        if not (lent and any(engine.spot is None and not engine.is_asleep for engine in self.world.engines)):
            self.lacking_since_s = self.world.now_s
        wait_s = self.world.now_s - max(self.lacking_since_s, self.world.undisturbed_since_s)
        assert wait_s <= LEAVE_WITHIN_S + SLACK_S, f"an engine waits for {wait_s} s for a card that is lent"

    def check_step(self, before: dict[int, QueuedJob]) -> None:
        """Priorities are kept, and nobody is disturbed too soon."""
        now = {job.id: job for job in self.world.queue.jobs(*STANDING)}
        started = [job for job in now.values() if job.state == RUNNING and before[job.id].state != RUNNING]
        waiting = [job for job in now.values() if job.state == WAITING]
        for job in started:
            taken = [
                spot.card.name
                for spot in self.world.spots
                if spot.card.name in job.cards and spot.occupant is not None and not self._falls_asleep(spot)
            ]
            assert not taken, f"job {job.id} is given {taken}, where somebody is"
            for other in waiting:
                assert not (_line(other) < _line(job) and self._could_use(other, job.cards)), f"job {job.id} passed job {other.id}"
        for job in now.values():
            if job.state == LEAVING and before[job.id].state == RUNNING and "goes before it" in job.reason:
                held_s = self.world.now_s - before[job.id].since_s
                assert held_s >= self.world.setting.lending.min_hold_s, f"job {job.id} was disturbed after {held_s} s"
                assert any(_line(other)[:2] < _line(job)[:2] for other in waiting), f"job {job.id} made room for nobody"
        self._check_outranked(now, waiting)
        self._check_guests(waiting)

    def _falls_asleep(self, spot: Spot) -> bool:
        """Whether an engine has it that may be on its way to sleep; whether chat is quiet enough is looked at where it is told to."""
        return isinstance(spot.occupant, Engine) and spot.occupant.seat is spot

    def _check_outranked(self, now: dict[int, QueuedJob], waiting: list[QueuedJob]) -> None:
        """Nobody waits for ever for a card of one who ranks below."""
        for other in waiting:
            below = [
                job
                for job in now.values()
                if job.state == RUNNING and _line(other)[:2] < _line(job)[:2] and self._could_use(other, job.cards)
            ]
            if not below or other.num_cards > 1:
                self.outranked_since_s.pop(other.id, None)
                continue
            since_s = max(
                self.outranked_since_s.setdefault(other.id, self.world.now_s),
                self.world.undisturbed_since_s,
                *(job.since_s for job in below),
            )
            limit_s = self.world.setting.lending.min_hold_s + LEAVE_WITHIN_S + RELEASE_S + START_S + SLACK_S
            assert self.world.now_s - since_s <= limit_s, f"job {other.id} waits behind {[job.id for job in below]}, which rank below"

    def _check_guests(self, waiting: list[QueuedJob]) -> None:
        """An engine that is a guest on a train card leaves it to a job that waits, where chat has more than its own number."""
        placed = [engine.spot.card.pool for engine in self.world.engines if engine.spot]
        num_own = (
            sum(spot.card.pool == SERVE and self.world.is_alive(spot) for spot in self.world.spots)
            if self.world.setting.lending.enabled
            else 1
        )
        hosts = [spot for spot in self.world.spots if spot.card.pool == TRAIN and isinstance(spot.occupant, Engine)]
        wanted = [spot for spot in hosts if any(job.num_cards == 1 and self._could_use(job, (spot.card.name,)) for job in waiting)]
        self.wanted_since_s = {
            spot.card.name: self.wanted_since_s.get(spot.card.name, self.world.now_s) for spot in wanted if len(placed) > max(1, num_own)
        }
        for spot in wanted:
            since_s = max(self.wanted_since_s.get(spot.card.name, self.world.now_s), spot.occupant.placed_s, self.world.undisturbed_since_s)
            limit_s = self.world.setting.lending.min_hold_s + RELEASE_S + SLACK_S
            assert self.world.now_s - since_s <= limit_s, f"an engine stays on {spot.card.name}, which a job waits for"

    def _could_use(self, job: QueuedJob, names: tuple[str, ...]) -> bool:
        suit = [spot.card for spot in self.world.spots if spot.card.memory_gib >= job.memory_gib and self.world.is_alive(spot)]
        suit = [card for card in suit if card.pool == TRAIN or self.world.setting.lending.enabled]
        return len(suit) >= job.num_cards and any(card.name in names for card in suit)


def _line(job: QueuedJob) -> tuple[int, int, float, int]:
    return RANKS[job.kind], -job.priority, job.place, job.id
