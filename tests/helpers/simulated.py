"""What a simulated cluster is made of: cards, engines, jobs' processes, and an arbiter that may be killed at each word.

Knows how long things take there. Does not know what happens when: see `tests.helpers.simulator`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from cluster.job_queue import Queue, QueuedJob
from cluster.rule import Card
from configs.schema import LendingConfig

REQUESTS_PER_S = 5000.0
"""What one engine answers."""
START_S = 8.0
"""From the moment an engine has its card."""
WAKE_S = 2.0
"""The same of one that slept."""
FALL_ASLEEP_S = 3.0
"""From the moment an engine is told to; whoever asks meanwhile waits until it has slept and woken."""
RELEASE_S = 2.0
"""Until the memory of an engine that ended is free."""
SETUP_S = 4.0
LEAVE_WITHIN_S = 12.0
SAVE_EVERY_S = 5.0
DOWN_AFTER_S = 6.0


class CrashError(Exception):
    """The arbiter was killed."""


class HeadIsDownError(Exception):
    """Nothing answers."""


class QuickQueue(Queue):
    """The real one, which does not read again what nobody changed."""

    def jobs(self, *states: str) -> list[QueuedJob]:
        if self.__dict__.setdefault("seen", {}).get("at") != self.connection.total_changes:
            self.seen: dict[Any, Any] = {"at": self.connection.total_changes}
        if states not in self.seen:
            self.seen[states] = super().jobs(*states)
        return list(self.seen[states])


@dataclass
class Spot:
    """A card, and who really has it."""

    card: Card
    occupant: Any = None
    back_s: float = 0.0
    """When its raylet is there again."""


@dataclass(eq=False)
class Engine:
    """A replica of Serve."""

    spot: Spot | None = None
    """The card that it has."""
    placed_s: float = math.inf
    gone_s: float = math.inf
    seat: Spot | None = None
    """Of one that can sleep: the card that it may have."""
    starts_s: float = START_S
    is_asleep: bool = False
    asleep_s: float = math.inf
    """When one that was told to sleep will."""

    def runs(self, now_s: float) -> bool:
        return self.is_up(now_s) and self.asleep_s == math.inf

    def is_up(self, now_s: float) -> bool:
        return now_s >= self.placed_s + self.starts_s and self.gone_s == math.inf


@dataclass(eq=False)
class Run:
    """A job's process."""

    job: QueuedJob
    spots: list[Spot] = field(default_factory=list)
    placed_s: float = math.inf
    leaves_s: float = math.inf


@dataclass
class Setting:
    """What a simulation is made of."""

    num_serve: int = 1
    num_train: int = 1
    min_engines: int = 1
    max_engines: int = 1
    uses_train_cards: bool = False
    can_sleep: bool = False
    engines_first: bool = False
    """Whom Ray serves first where an engine and a job ask for one card: nobody knows."""
    num_idle_cores: float = 0.0
    lending: LendingConfig = field(default_factory=lambda: LendingConfig(enabled=True, quiet_after_s=10, min_hold_s=20))


@dataclass
class Fragile:
    """When the arbiter dies."""

    num_left: int = -1
    for_s: float = 0.0

    def touch(self) -> None:
        """Count a word or deed."""
        self.num_left -= self.num_left >= 0
        if self.num_left == 0:
            self.num_left = -1
            raise CrashError


class Breakable:
    """The queue or the ground as an arbiter has them that may be killed before and after each call."""

    def __init__(self, real: Any, fragile: Fragile) -> None:
        self.real, self.fragile = real, fragile

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.fragile.touch()
            found = getattr(self.real, name)(*arguments)
            self.fragile.touch()
            return found

        return call
