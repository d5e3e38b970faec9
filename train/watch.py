"""A look at a version after it was let in, beside the one that was live before; says as soon as it is worse.

Errors and latency are those of its own small probe: held-out questions, asked of both versions in turn, over the same endpoint as
everybody's. Thumbs are those that people gave to the new version meanwhile, and to the old one ever: once another is promoted over it, it
gets no more. Knows how to compare. Does not know what becomes of the version.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import TandemError
from configs.schema import WatchConfig
from data.ask import Endpoint, Probe, probe_all
from data.conversations import Conversation
from data.feedback_store import read_ratings
from train.contenders import Say

DOWN = "down"
ANSWER_TOKENS = 32
S_PER_MINUTE = 60


@dataclass(frozen=True)
class Health:
    """How one version did so far."""

    probes: tuple[Probe, ...] = ()
    thumbs: tuple[str, ...] = ()

    @property
    def error_share(self) -> float:
        """The share of requests that failed."""
        return sum(probe.failed for probe in self.probes) / max(1, len(self.probes))

    @property
    def latency_s(self) -> float | None:
        """The median time of a whole answer, in seconds; None where there is none."""
        answered = [probe.duration_s for probe in self.probes if not probe.failed]
        return statistics.median(answered) if answered else None

    @property
    def down_share(self) -> float:
        """The share of thumbs that point down."""
        return sum(thumb == DOWN for thumb in self.thumbs) / max(1, len(self.thumbs))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures."""
        figures = {"num_answers": len(self.probes), "error_share": self.error_share, "latency_s": self.latency_s}
        return {**figures, "num_thumbs": len(self.thumbs), "down_share": self.down_share}


@dataclass(frozen=True)
class Outcome:
    """How the watch ended: the reasons why the version is worse, none if it held."""

    reasons: tuple[str, ...]
    new: Health
    old: Health
    duration_s: float
    is_enough: bool
    """Whether there were answers enough to judge errors and latency by."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "new": self.new.to_dict(), "old": self.old.to_dict()}


@dataclass
class Watched:
    """Two versions, what they are asked, and how they did."""

    endpoint: Endpoint
    new: str
    old: str
    conversations: Sequence[Conversation]


def watch(config: WatchConfig, pair: Watched, say: Say) -> Outcome:
    """Look at both versions until the time is over or the new one is worse."""
    began_s, ends = time.time(), time.monotonic() + config.minutes * S_PER_MINUTE
    started, draw = time.monotonic(), random.Random(0)  # noqa: S311 (which questions are asked is no secret)
    probes: dict[str, list[Probe]] = {pair.new: [], pair.old: []}
    while True:
        asked = draw.sample(list(pair.conversations), min(config.num_questions, len(pair.conversations)))
        for name in draw.sample([pair.new, pair.old], 2):  # neither is always the first, which finds a cold cache
            probes[name] += probe_all(pair.endpoint, name, asked, ANSWER_TOKENS)
        new, old = (Health(tuple(probes[name]), _thumbs(name, since_s, say)) for name, since_s in ((pair.new, began_s), (pair.old, 0.0)))
        is_over = time.monotonic() + config.every_s > ends
        reasons = worse(config, new, old)
        if reasons or is_over:
            return Outcome(tuple(reasons), new, old, time.monotonic() - started, _num_answers(new, old) >= config.min_answers)
        say(f"watching {pair.new}: {len(new.probes)} answers, {new.error_share:.0%} failed, {len(new.thumbs)} thumbs")
        time.sleep(config.every_s)


def worse(config: WatchConfig, new: Health, old: Health) -> list[str]:
    """Return in which ways the new version does worse than the old one, as far as enough is known."""
    reasons = []
    if _num_answers(new, old) >= config.min_answers:
        if new.error_share - old.error_share > config.errors_more:
            reasons.append(f"{new.error_share:.0%} of its requests fail, and {old.error_share:.0%} of the other's")
        if new.latency_s and old.latency_s and new.latency_s > config.latency_times * old.latency_s:
            reasons.append(f"its median answer takes {new.latency_s:.2f} s, and the other's {old.latency_s:.2f} s")
    if min(len(new.thumbs), len(old.thumbs)) >= config.min_thumbs and new.down_share - old.down_share > config.thumbs_down_more:
        reasons.append(f"{new.down_share:.0%} of its thumbs point down, and {old.down_share:.0%} of the other's")
    return reasons


def _num_answers(new: Health, old: Health) -> int:
    return min(len(new.probes), len(old.probes))


def _thumbs(version: str, since_s: float, say: Say) -> tuple[str, ...]:
    """Return a version's thumbs; none where the database is away, which is no reason to leave a version unwatched."""
    try:
        return tuple(read_ratings(version, since_s))
    except TandemError as error:
        say(f"watching without thumbs: {error.what}")
        return ()
