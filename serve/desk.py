"""What engines on joined machines share with the head: its keys, its feedback, and how long they have been quiet.

An actor on the head's node reads and writes the head's home folder for them, where `python -m serve keys` and the arbiter look. Knows Ray.
Does not know HTTP.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.activity import note_quiet, read_activity
from cluster.logs import set_up
from cluster.session import RAY_NAMESPACE, operator_key
from configs.errors import AccessError, ClusterError
from configs.schema import FeedbackConfig
from data.feedback_store import WRITE_TIMEOUT_S, FeedbackStore, Row, StoreError, feedback_url
from serve.completion_ids import CompletionIds
from serve.feedback import FeedbackDesk
from serve.keys import STORED, Key, KeyFile

ACTOR = "desk"
LOOK_EVERY_S = 0.5
MAX_AGE_S = 2.0  # a key that was revoked opens nothing after so long, even where the head is out of reach
START_TIMEOUT_S = 60.0

log = logging.getLogger("tandem.serve")


class Desk:
    """The head's end."""

    def __init__(self) -> None:
        set_up()
        self.keys, self.store = KeyFile(), FeedbackStore(feedback_url())

    async def completion_secret(self) -> str:
        """Return what the ids of answers are sealed with, so that every engine knows those of the others."""
        return CompletionIds.of_home().secret

    async def exchange(self, node_id: str, pid: int, quiet_s: float) -> bytes:
        """Take how long an engine has been quiet; return the keys as they are now.

        Raises:
            AccessError: They cannot be read.
        """
        note_quiet(node_id, pid, quiet_s)
        return STORED.dump_json(self.keys.read())

    async def save(self, row: Row) -> None:
        """Store what somebody said of an answer.

        Raises:
            StoreError: It is not stored, or not in time.
        """
        await self.store.save(row)

    async def keep(self, row: Row, num_bytes: int) -> None:
        """Store a conversation some time."""
        self.store.keep(lambda: row, num_bytes)


class HeadKeys(KeyFile):
    """The head's keys, as they were at most `MAX_AGE_S` ago; without the head nobody comes in."""

    def __init__(self, host: str) -> None:
        super().__init__(host=host, operator_secret=operator_key())
        self.asked_s = -MAX_AGE_S

    def take(self, keys: list[Key], asked_s: float) -> None:
        """Take what the head said when it was asked at a moment."""
        self._keys, self.asked_s = {key.sha256: key for key in keys}, asked_s

    def read(self) -> list[Key]:
        """Return all keys.

        Raises:
            AccessError: The head was not heard of lately.
        """
        if time.monotonic() - self.asked_s > MAX_AGE_S:
            raise AccessError("the keys are not known", f"the head has not answered for {MAX_AGE_S:g} s", "python -m cluster status")
        return list(self._keys.values())

    def _look(self) -> None:
        self.read()  # in memory, and as old as it says: at each request


class HeadStore(FeedbackStore):
    """The head's store of feedback and conversations."""

    def __init__(self, desk: Any) -> None:
        super().__init__("")
        self.desk = desk

    async def save(self, row: Row) -> None:
        """Store what somebody said of an answer, and wait until it is written.

        Raises:
            StoreError: It is not, or not in time.
        """
        try:
            await asyncio.wait_for(self.desk.save.remote(row), WRITE_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            raise StoreError(f"the head did not store it ({type(error).__name__})") from None

    def keep(self, make_row: Callable[[], Row | None], num_bytes: int = 0) -> None:
        """Hand a conversation to the head; what gets lost on the way is left out."""
        with suppress(RayError):
            if row := make_row():
                self.desk.keep.remote(row, num_bytes)


def find_desk() -> Any:
    """Return the head's end, started if it is not there."""
    head = {"node:__internal_head__": 0.001}
    settings = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0, "resources": head, "max_restarts": -1}
    return ray.remote(Desk).options(name=ACTOR, namespace=RAY_NAMESPACE, **settings).remote()


async def feedback_of_head(config: FeedbackConfig, desk: Any) -> FeedbackDesk:
    """Return the head's desk for feedback.

    Raises:
        ClusterError: The head does not answer.
    """
    try:
        secret = await asyncio.wait_for(desk.completion_secret.remote(), START_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        raise ClusterError("the head does not answer", str(error), "python -m cluster status") from None
    return FeedbackDesk(config, HeadStore(desk), CompletionIds(secret))


async def watch_keys(desk: Any, keys: HeadKeys) -> None:
    """Ask the head for its keys for ever, and tell it how long this engine has been quiet."""
    node_id, pid, trouble = ray.get_runtime_context().get_node_id(), os.getpid(), ""
    while True:
        asked_s = time.monotonic()
        try:
            told = await asyncio.wait_for(desk.exchange.remote(node_id, pid, read_activity(pid).quiet_s), MAX_AGE_S)
            keys.take(STORED.validate_json(told), asked_s)
            now_trouble = ""
        except (RayError, AccessError, TimeoutError, ValueError) as error:
            now_trouble = f"{type(error).__name__}: {error}"
        if bool(now_trouble) != bool(trouble):
            log.warning("%s", f"the head does not tell its keys: {now_trouble}" if now_trouble else "the head tells its keys again")
        trouble = now_trouble
        await asyncio.sleep(LOOK_EVERY_S)
