"""A cluster in which time is a number: cards, chat with its autoscaler, jobs, and all that may die, under the real arbiter and queue.

It behaves as Ray does where that matters: who asks for a card waits for it and holds it alone, an engine takes seconds to start, a run
that is asked to leave takes its time or hangs until it is killed, Serve decides which engine leaves. `tests.helpers.laws` says what must
always be true in it.
"""

import math
from collections import deque
from dataclasses import replace

from cluster.arbiter import LOST, Arbiter, Driver, Sight
from cluster.job_queue import LEAVING, RUNNING, STANDING, NewJob, QueuedJob
from cluster.rule import SERVE, TRAIN, Card, Chat
from configs.errors import EXIT_NO_FIT, EXIT_STOPPED
from tests.helpers.laws import Laws
from tests.helpers.simulated import (
    DOWN_AFTER_S,
    FALL_ASLEEP_S,
    LEAVE_WITHIN_S,
    RELEASE_S,
    REQUESTS_PER_S,
    SAVE_EVERY_S,
    SETUP_S,
    START_S,
    WAKE_S,
    Breakable,
    CrashError,
    Engine,
    Fragile,
    HeadIsDownError,
    QuickQueue,
    Run,
    Setting,
    Spot,
)


class Simulation:
    """The world; it is also the arbiter's ground."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.now_s = setting, 0.0
        cards = [Card(f"serve{at}", SERVE, memory_gib=16) for at in range(setting.num_serve)]
        cards += [Card(f"train{at}", TRAIN, memory_gib=32) for at in range(setting.num_train)]
        self.spots = [Spot(card) for card in cards]
        self.engines: list[Engine] = []
        self.target, self.low_since_s = setting.min_engines, 0.0
        self.is_chat_lost = False
        self.bounds_now = (setting.min_engines, max(1, setting.max_engines))
        self.waiting: deque[list[float]] = deque()
        """Arrivals: when, how many, and the seconds that one engine needs for them and those before them."""
        self.last_request_s = 0.0
        self.runs: dict[str, Run] = {}
        self.drivers: dict[str, Driver] = {}
        self.work: dict[int, float] = {}
        """Seconds of training that each job still needs, and what of them is saved."""
        self.saved: dict[int, float] = {}
        self.needs_gib: dict[int, float] = {}
        """Of a card's memory, as each job finds out at its turn."""
        self.leave_s = 2.0
        self.head_back_s = 0.0
        self.queue = QuickQueue(":memory:")
        self.fragile = Fragile()
        self.arbiter_back_s = 0.0
        self._new_arbiter()
        self.undisturbed_since_s = 0.0
        self.laws = Laws(self)
        self.sleeps_s: list[float] = []
        self.longest_wait_s = 0.0
        self.num_answered = 0.0

    def _new_arbiter(self) -> None:
        self.arbiter = Arbiter(Breakable(self.queue, self.fragile), Breakable(self, self.fragile), self.setting.lending)  # type: ignore[arg-type]

    # What happens from outside.

    def submit_job(self, kind: str, work_s: float, priority: int = 0, num_cards: int = 1, *gib: float) -> QueuedJob | None:
        """Submit what the whole cluster has cards for: of `gib` memory each, by what is reckoned as it is submitted, and in truth."""
        memory_gib, needs_gib = min(gib, default=0.0), max(gib, default=0.0)
        suit = [
            spot for spot in self.spots if spot.card.memory_gib >= needs_gib and (spot.card.pool == TRAIN or self.setting.lending.enabled)
        ]
        if len(suit) < num_cards:
            return None
        new = NewJob("train" if kind == "train" else "sweep", "bot", "", priority=priority, num_cards=num_cards, memory_gib=memory_gib)
        job = self.queue.submit(new, now_s=self.now_s)
        self.work[job.id] = self.saved[job.id] = work_s
        self.needs_gib[job.id] = needs_gib
        return job

    def arrive(self, num_requests: float) -> None:
        """Let requests come in."""
        if self.setting.max_engines:
            backlog = num_requests + sum(number for _, number, _ in self.waiting)
            self.waiting.append([self.now_s, num_requests, backlog / REQUESTS_PER_S])

    def rush(self, requests_per_s: float, for_s: int) -> None:
        """Let requests come in all the time."""
        for _ in range(for_s):
            self.arrive(requests_per_s)
            self.run(1)

    def kill_run(self) -> None:
        """Kill the process of a job, as a dead worker does after its own attempts."""
        for submission, run in list(self.runs.items())[:1]:
            self._lose(submission, run)

    def kill_engine(self) -> None:
        """Kill an engine; Serve starts another."""
        for engine in self.engines[:1]:
            self._remove(engine)
        self.disturb(START_S)

    def kill_raylet(self, at: int, for_s: float) -> None:
        """Let a card and all on it be gone for a while."""
        spot = self.spots[at % len(self.spots)]
        self._clear(spot)
        spot.back_s = self.now_s + for_s
        if spot.card.pool == SERVE or self.uses_train_cards:
            self.disturb(for_s + START_S)

    def kill_head(self, for_s: float) -> None:
        """Lose everything that is not on disk."""
        for spot in self.spots:
            self._clear(spot)
        self.engines, self.runs, self.drivers = [], {}, {}
        self.head_back_s = self.now_s + for_s
        self.target, self.is_chat_lost = 0, bool(self.setting.max_engines)
        self.disturb(math.inf)  # until the arbiter brings chat back

    def kill_arbiter(self, after_calls: int, for_s: float) -> None:
        """Kill the arbiter at its so many-th word or deed from now; another comes later."""
        self.fragile.num_left, self.fragile.for_s = after_calls, for_s

    def occupy(self) -> None:
        """Let somebody take a train card without the queue."""
        for spot in self.spots:
            if spot.card.pool == TRAIN and spot.occupant is None and self.is_alive(spot):
                spot.occupant = "foreign"
                return

    def leave_foreign(self) -> None:
        """Let all who never stood in line go."""
        for spot in self.spots:
            spot.occupant = None if spot.occupant == "foreign" else spot.occupant

    def disturb(self, for_s: float) -> None:
        """Chat cannot be served so long, whatever the rule says."""
        self.undisturbed_since_s = max(self.undisturbed_since_s, self.now_s + for_s)

    # The arbiter's ground.

    def look(self) -> Sight:
        self._require_head()
        cards = tuple(self._seen(spot) for spot in self.spots)
        if self.is_chat_lost:
            return Sight(cards, Chat(), None, dict(self.drivers), lost_chat=True)
        return Sight(cards, self._chat(), self.bounds_now, dict(self.drivers), num_idle_cores=self.setting.num_idle_cores)

    def send_to_sleep(self, card: str) -> bool:
        self._require_head()
        engine = next(engine for engine in self.engines if engine.seat and engine.seat.card.name == card)
        assert self.setting.lending.enabled
        assert self._quiet_s() >= self.setting.lending.quiet_after_s, "an engine is sent to sleep before chat was quiet long enough"
        if self.waiting or not engine.runs(self.now_s):
            return True  # it has something to do by now, and stays
        engine.asleep_s = self.now_s + FALL_ASLEEP_S
        self.sleeps_s.append(self.now_s)
        return True

    def restore_chat(self) -> None:
        self._require_head()
        self.is_chat_lost, self.undisturbed_since_s = False, self.now_s + START_S
        self.target, self.bounds_now = self.setting.min_engines, (self.setting.min_engines, max(1, self.setting.max_engines))

    def submit(self, job: QueuedJob) -> None:
        self._require_head()
        if job.submission not in self.drivers:
            twice = [run for run in self.runs.values() if run.job.id == job.id]
            assert not twice, f"job {job.id} is run twice at once"
            self.drivers[job.submission] = Driver("alive")
            self.runs[job.submission] = Run(job)

    def stop(self, submission: str) -> None:
        self._require_head()
        run = self.runs[submission]
        if run.leaves_s == math.inf:
            run.leaves_s = self.now_s + min(self.leave_s, LEAVE_WITHIN_S)

    def words(self, submission: str) -> str:
        return f"the words of {submission}"

    def tail(self, submission: str) -> str:
        return f"  the last lines of {submission}"

    def bound(self, fewest: int, most: int) -> None:
        self._require_head()
        setting = self.setting
        if fewest < min(setting.min_engines, most) and fewest < self.bounds_now[0]:
            assert setting.lending.enabled or any(engine.spot and engine.spot.card.pool == TRAIN for engine in self.engines)
            assert self._quiet_s() >= setting.lending.quiet_after_s, "an engine is sent to sleep before chat was quiet long enough"
            self.sleeps_s.append(self.now_s)
        self.bounds_now = (fewest, most)

    def _require_head(self) -> None:
        if self.now_s < self.head_back_s:
            raise HeadIsDownError

    def _seen(self, spot: Spot) -> Card:
        engine = spot.occupant.placed_s if isinstance(spot.occupant, Engine) else None
        seen = replace(spot.card, is_alive=self.is_alive(spot), engine_since_s=engine, is_foreign=spot.occupant == "foreign")
        seated = [engine for engine in self.engines if engine.seat is spot]
        answers, called = any(engine.is_up(self.now_s) for engine in seated), any(not e.is_asleep and e.spot is None for e in seated)
        return replace(seen, is_seated=bool(seated), is_answering=answers, is_called=called)

    def _chat(self) -> Chat:
        setting = self.setting
        num_wanted = max(0, self.target - sum(engine.is_asleep for engine in self.engines))
        return Chat(setting.min_engines, setting.max_engines, self.uses_train_cards, num_wanted, self._quiet_s())

    @property
    def uses_train_cards(self) -> bool:
        return self.setting.uses_train_cards and not self.setting.can_sleep

    def _quiet_s(self) -> float:
        running = [engine.placed_s + engine.starts_s for engine in self.engines if engine.is_up(self.now_s)]
        if self.waiting or (self.target and not running and not any(engine.is_asleep for engine in self.engines)):
            return 0.0
        return self.now_s - max(self.last_request_s, *running) if running else math.inf

    # Time.

    def run(self, seconds: int) -> None:
        """Let time pass, and look at each second whether all is as it must be."""
        for _ in range(seconds):
            self.now_s += 1
            if self.now_s >= self.head_back_s:
                self._serve()
                self._scale()
                self._fall_asleep()
                self._place()
                self._train()
            self._arbitrate()
            self.laws.check()

    def is_alive(self, spot: Spot) -> bool:
        return self.now_s >= spot.back_s and self.now_s >= self.head_back_s

    def _serve(self) -> None:
        room = REQUESTS_PER_S * sum(engine.runs(self.now_s) for engine in self.engines)
        while self.waiting and room > 0:
            arrived_s, number, _ = self.waiting[0]
            taken = min(room, number)
            room -= taken
            self.num_answered += taken
            self.last_request_s = self.now_s
            self.longest_wait_s = max(self.longest_wait_s, self.now_s - arrived_s)
            self.waiting[0][1] -= taken
            if self.waiting[0][1] <= 0:
                self.waiting.popleft()

    def _scale(self) -> None:
        """Do as Serve's autoscaler: up at once, down after a while, within the bounds."""
        if self.is_chat_lost:
            return
        wanted = math.ceil(sum(number for _, number, _ in self.waiting) / REQUESTS_PER_S)
        self.low_since_s = self.now_s if wanted >= self.target else self.low_since_s
        if wanted > self.target or self.now_s - self.low_since_s >= DOWN_AFTER_S:
            self.target = wanted
        self.target = max(self.bounds_now[0], min(self.target, self.bounds_now[1])) if self.setting.max_engines else 0
        for engine in self.engines if self.waiting else []:
            engine.is_asleep = False  # it is asked, and wants its card
        staying = [engine for engine in self.engines if engine.gone_s == math.inf]
        order = [engine for engine in staying if not engine.spot]
        order += [engine for engine in staying if engine.spot and engine.spot.card.pool == TRAIN]
        order += [engine for engine in reversed(staying) if engine.spot and engine.spot.card.pool == SERVE]
        for engine in order[: max(0, len(staying) - self.target)]:
            engine.gone_s = self.now_s + RELEASE_S
        self.engines += [Engine() for _ in range(self.target - len(staying))]
        for engine in [engine for engine in self.engines if self.now_s >= engine.gone_s]:
            self._remove(engine)

    def _fall_asleep(self) -> None:
        for engine in self.engines:
            if engine.seat and self.now_s >= engine.asleep_s:
                engine.seat.occupant, engine.spot, engine.placed_s, engine.is_asleep = None, None, math.inf, True
                engine.starts_s, engine.asleep_s = WAKE_S, math.inf

    def _place(self) -> None:
        order = [self._place_runs, self._place_engines]
        for place in reversed(order) if self.setting.engines_first else order:
            place()

    def _place_runs(self) -> None:
        given = {job.submission: job for job in self.queue.jobs(RUNNING, LEAVING)}
        for submission, run in self.runs.items():
            run.job = given.get(submission, run.job)  # one that was started before its turn hears of its cards
            wanted = [spot for spot in self._free() if spot.card.name in run.job.cards]
            if not run.spots and len(wanted) == len(run.job.cards) > 0:
                run.spots, run.placed_s = wanted, self.now_s
                for spot in wanted:
                    spot.occupant = run

    def _place_engines(self) -> None:
        for engine in self.engines:
            if engine.spot is None and not engine.is_asleep and (spot := self._spot_for(engine)):
                engine.spot, engine.placed_s, spot.occupant = spot, self.now_s, engine

    def _spot_for(self, engine: Engine) -> Spot | None:
        """Return the free card that an engine gets; one that can sleep takes a seat first, and then waits for that card alone."""
        if not self.setting.can_sleep:
            pools = (SERVE, TRAIN) if self.uses_train_cards else (SERVE,)
            return next((spot for pool in pools for spot in self._free() if spot.card.pool == pool), None)
        if engine.seat is None:
            taken = [other.seat for other in self.engines]
            engine.seat = next((s for s in self.spots if s.card.pool == SERVE and self.is_alive(s) and s not in taken), None)
        elif engine.placed_s == math.inf and engine.seat.occupant is None and self.is_alive(engine.seat):
            return engine.seat
        return None

    def _train(self) -> None:
        standing = {job.submission for job in self.queue.jobs(*STANDING)}
        for submission, run in list(self.runs.items()):
            if not run.job.cards and submission not in standing:
                self._finish(submission, Driver("ended", EXIT_STOPPED), saved=False)
            elif self.now_s >= run.leaves_s:
                hung = self.leave_s > LEAVE_WITHIN_S
                self._finish(submission, Driver("stopped"), saved=not hung)
            elif run.spots and min(spot.card.memory_gib for spot in run.spots) < self.needs_gib[run.job.id]:
                self._finish(submission, Driver("ended", EXIT_NO_FIT), saved=False)
            elif self.now_s >= run.placed_s + SETUP_S:
                self.work[run.job.id] -= 1
                if (self.now_s - run.placed_s) % SAVE_EVERY_S == 0:
                    self.saved[run.job.id] = self.work[run.job.id]
                if self.work[run.job.id] <= 0:
                    self._finish(submission, Driver("ended", 0), saved=True)

    def _arbitrate(self) -> None:
        if self.now_s < self.arbiter_back_s:
            return
        before = {job.id: job for job in self.queue.jobs(*STANDING)}
        try:
            self.arbiter.step(self.now_s)
        except HeadIsDownError:
            return
        except CrashError:
            self.arbiter_back_s = self.now_s + self.fragile.for_s
            self.disturb(self.fragile.for_s + 1)
            self._new_arbiter()
            return
        self.laws.check_step(before)

    def _free(self) -> list[Spot]:
        return [spot for spot in self.spots if spot.occupant is None and self.is_alive(spot)]

    def _clear(self, spot: Spot) -> None:
        for engine in [engine for engine in self.engines if engine.seat is spot and engine is not spot.occupant]:
            self._remove(engine)
        if isinstance(spot.occupant, Engine):
            self._remove(spot.occupant)
        elif isinstance(spot.occupant, Run):
            self._lose(spot.occupant.job.submission, spot.occupant)
        spot.occupant = None

    def _remove(self, engine: Engine) -> None:
        self.engines.remove(engine)
        if engine.spot:
            engine.spot.occupant = None

    def _lose(self, submission: str, run: Run) -> None:
        self._finish(submission, Driver("stopped" if run.leaves_s < math.inf else "ended", LOST), saved=False)

    def _finish(self, submission: str, driver: Driver, saved: bool) -> None:
        run = self.runs.pop(submission)
        self.drivers[submission] = driver
        if saved:
            self.saved[run.job.id] = self.work[run.job.id]
        self.work[run.job.id] = self.saved[run.job.id]
        for spot in run.spots:
            spot.occupant = None
