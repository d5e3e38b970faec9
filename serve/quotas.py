"""How much each key may ask in a minute, counted over all replicas.

One Ray actor counts, with the `limits` library: it outlives every replica, and what a replica counted is not lost with it. A key
without quotas never asks it. Does not know HTTP.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from cluster.metrics import QUOTA_USED
from cluster.session import RAY_NAMESPACE
from serve.keys import Key

REQUESTS, TOKENS = "requests", "tokens"
ACTOR = "quotas"
TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0


Asked = tuple[str, dict[str, int], int]
"""A key's hash, its quotas by kind, and the tokens of a request's prompt."""
Spent = tuple[str, int, int]
"""A key's hash, its quota of tokens, and the tokens of an answer."""


@dataclass(frozen=True)
class Standing:
    """How one quota of a key stands; `reset_s` is the time until it is whole again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True)
class Admission:
    """Whether a request may go on; where not, `spent` names the quota that keeps it longest."""

    standings: dict[str, Standing]
    spent: str | None = None

    @property
    def retry_s(self) -> int:
        """Whole seconds until the spent quota is whole again."""
        return max(1, math.ceil(self.standings[self.spent].reset_s)) if self.spent else 0


class Counter:
    """Counts the requests and tokens of fixed minutes; one begins with the first thing that is counted in it.

    A prompt's tokens are guessed and counted at once, the others after the answer. So a key may go over its tokens by the answers
    that are under way, and over the end of a minute twice the limit may pass; what is over is not carried on.
    """

    def __init__(self) -> None:
        self.limiter = FixedWindowRateLimiter(MemoryStorage())

    def take(self, key: str, quotas: dict[str, int], num_tokens: int) -> Admission:
        """Count one request and the tokens that its prompt has, unless a quota is spent; one that is refused does not count."""
        items = {kind: RateLimitItemPerMinute(limit) for kind, limit in quotas.items()}
        spent = [kind for kind, item in items.items() if not self.limiter.test(item, key, kind)]
        if not spent:
            for kind, item in items.items():
                self.limiter.hit(item, key, kind, cost=1 if kind == REQUESTS else num_tokens)
        standings = {kind: self._standing(item, key, kind) for kind, item in items.items()}
        return Admission(standings, max(spent, key=lambda kind: standings[kind].reset_s, default=None))

    def spend(self, key: str, limit: int, num_tokens: int) -> None:
        """Count more tokens, also those over the limit."""
        self.limiter.hit(RateLimitItemPerMinute(limit), key, TOKENS, cost=num_tokens)

    def take_all(self, asked: list[Asked], spent: list[Spent]) -> list[Admission]:
        """Count what was spent, and then requests, in their order: all that came to a replica while it waited for the last answer."""
        for one in spent:
            self.spend(*one)
        return [self.take(*one) for one in asked]

    def _standing(self, item: RateLimitItemPerMinute, key: str, kind: str) -> Standing:
        window = self.limiter.get_window_stats(item, key, kind)
        return Standing(item.amount, window.remaining, max(0.0, window.reset_time - time.time()))


class Quotas(Protocol):
    """Where the front asks."""

    async def take(self, key: Key, num_tokens: int) -> Admission:
        """Count one request of a key that has quotas, and its prompt's tokens, unless a quota is spent.

        Raises:
            QuotaError: They cannot be counted now.
        """

    def spend(self, key: Key, num_tokens: int) -> None:
        """Count an answer's tokens, without waiting."""


class QuotaError(Exception):
    """Quotas cannot be counted now."""


def quotas_of(key: Key) -> dict[str, int]:
    """Return a key's quotas by kind; none where it has none."""
    return {kind: limit for kind, limit in ((REQUESTS, key.rpm), (TOKENS, key.tpm)) if limit is not None}


class ClusterQuotas:
    """The counter of this cluster: an actor that is started when the first key with quotas is used.

    It is asked once at a time, and what comes meanwhile together: calls to an actor are most of what keys cost the loop that answers.
    While it does not answer, a request waits for what was asked before, too; tokens that were spent meanwhile are not counted.
    """

    def __init__(self) -> None:
        self._actor: Any = None
        self._asked: list[tuple[Key, int, asyncio.Future[Admission]]] = []
        self._spent: list[Spent] = []
        self._sender: asyncio.Task[None] | None = None

    async def take(self, key: Key, num_tokens: int) -> Admission:
        """Count one request of a key that has quotas, and its prompt's tokens, unless a quota is spent.

        Raises:
            QuotaError: The counter does not answer.
        """
        answer: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        self._asked.append((key, num_tokens, answer))
        self._send_soon()
        return await answer

    def spend(self, key: Key, num_tokens: int) -> None:
        """Count an answer's tokens, without waiting."""
        if key.tpm is not None and num_tokens:
            self._spent.append((key.sha256, key.tpm, num_tokens))
            self._send_soon()

    def _send_soon(self) -> None:
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
            self._sender.add_done_callback(self._ended)

    def _ended(self, sender: asyncio.Task[None]) -> None:
        """Nobody waits for ever, whatever ended the one who asks."""
        if not sender.cancelled() and (error := sender.exception()):
            logging.getLogger(__name__).error("quotas are not told of: %s", error)
        if self._asked:
            self._send_soon()

    async def _send(self) -> None:
        while self._asked or self._spent:
            asked = [one for one in self._asked if not one[2].done()]  # whose client is still there
            spent, self._asked, self._spent = self._spent, [], []
            try:
                admissions = await self._ask([(key.sha256, quotas_of(key), num_tokens) for key, num_tokens, _ in asked], spent)
            except Exception as error:
                for _, _, answer in asked:
                    if not answer.done():
                        answer.set_exception(QuotaError(str(error)))
                continue
            for (_, _, answer), admission in zip(asked, admissions, strict=True):
                if not answer.done():
                    answer.set_result(admission)
            _tell({key.name: admission for (key, _, _), admission in zip(asked, admissions, strict=True)})

    async def _ask(self, asked: list[Asked], spent: list[Spent]) -> list[Admission]:
        timeout_s = TIMEOUT_S if self._actor else START_TIMEOUT_S
        self._actor = self._actor or await asyncio.to_thread(_counter)
        found: list[Admission] = await asyncio.wait_for(self._actor.take_all.remote(asked, spent), timeout_s)
        return found


def _tell(newest: dict[str, Admission]) -> None:
    """Keep for the metrics how each key's quotas stand, by its name."""
    for name, admission in newest.items():
        for kind, standing in admission.standings.items():
            QUOTA_USED.set(1 - standing.remaining / standing.limit, key=name, quota=kind)


def _counter() -> Any:
    """Return the cluster's counter, started if it is not there; on the head's node, without which there is no cluster."""
    import ray

    head = {"node:__internal_head__": 0.001}
    settings = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0, "resources": head, "max_restarts": -1, "max_task_retries": 1}
    return ray.remote(Counter).options(name=ACTOR, namespace=RAY_NAMESPACE, **settings).remote()
