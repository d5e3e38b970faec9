"""An engine that gives its card back while chat is quiet, and takes it again when a request comes; its process stays.

Who is asked for while it sleeps waits, and is answered. Knows Ray's placement groups and the file by which the engine and the arbiter
hear of each other (`cluster.activity`). Does not know what an engine is, beyond `sleep` and `wake_up`, nor who gets the card.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from cluster.activity import ActivityFile
from cluster.placement import CARD
from serve.alive import dead_engine

LOOK_EVERY_S = 0.25
KEEP_WEIGHTS = 1  # vLLM's level of sleep that moves weights to the machine's memory; the KV cache is forgotten
WAIT_S = 3600.0
MEMORY_WITHIN_S = 10.0

log = logging.getLogger("tandem.serve")


class CardHold(Protocol):
    """The right to use a card."""

    async def take(self) -> None:
        """Wait for the card, and hold it."""

    async def release(self) -> None:
        """Give it back."""


class RayCardHold:
    """The card of this process's raylet, held by a placement group, which leaves with this process too."""

    def __init__(self) -> None:
        self.group: Any = None

    async def take(self) -> None:
        """Wait for the card, and hold it."""
        import ray
        from ray.util.placement_group import placement_group

        card = ray.get_runtime_context().get_node_labels()[CARD]
        self.group = await asyncio.to_thread(placement_group, [{CARD: 1}], bundle_label_selector=[{CARD: card}])
        while not await asyncio.to_thread(self.group.wait, WAIT_S):
            log.warning("the engine still waits for %s", card)

    async def release(self) -> None:
        """Give it back."""
        from ray.util.placement_group import remove_placement_group

        await asyncio.to_thread(remove_placement_group, self.group)


class Sleeper:
    """One engine's sleep."""

    def __init__(self, hold: CardHold, file: ActivityFile) -> None:
        self.hold, self.file = hold, file
        self.engine: Any = None
        self.num_users = 0
        self.sleeps = self.has_failed = False
        self.freed_bytes = 0
        self.turn = asyncio.Lock()
        self.waking: asyncio.Task[None] | None = None

    async def take_card(self) -> None:
        """Wait for the card before there is an engine."""
        self.file.tell("waiting")
        await self.hold.take()
        self.file.tell("awake")

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Keep the engine awake, and wake it first where it sleeps.

        Raises:
            RefusedError: It does not wake; its replica ends.
        """
        self.num_users += 1  # before any wait: it goes to sleep for nobody who is here
        try:
            if self.sleeps:
                await self._wait_awake()
            yield
        finally:
            self.num_users -= 1

    async def _wait_awake(self) -> None:
        """Wait until the engine is awake: one wakes it for all, and goes on if it goes away. One that died would let them wait for ever."""
        if self.waking is None:
            self.waking = asyncio.create_task(self._wake())
            self.waking.add_done_callback(self._woken)
        waking = self.waking
        while not waking.done():
            await asyncio.wait({waking}, timeout=LOOK_EVERY_S)
            if self.engine.errored:
                raise dead_engine()
        waking.result()

    def _woken(self, waking: "asyncio.Task[None]") -> None:
        """Let the next sleep have a waking of its own; an error is told to all who waited, if there are any."""
        self.waking = None
        if not waking.cancelled():
            waking.exception()

    async def watch(self) -> None:
        """Go to sleep when told to, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(OSError):  # the disk may be full, and is looked at again
                if self.file.is_told_to_sleep():
                    await self._sleep()

    async def _sleep(self) -> None:
        async with self.turn:
            if self.num_users or self.sleeps:
                return
            self.sleeps, began_s = True, time.monotonic()  # whoever comes from now on wakes it when this turn is over
            before_bytes = gpu_free_bytes()
            try:
                await self.engine.sleep(KEEP_WEIGHTS)
                self.freed_bytes = gpu_free_bytes() - before_bytes
                await self.hold.release()
                self.file.tell("asleep")
            except Exception:
                self._fail("fall asleep")
            else:
                log.info("the engine sleeps after %.1f s, and its card is free", time.monotonic() - began_s)

    async def _wake(self) -> None:
        async with self.turn:
            if self.has_failed:  # it did not fall asleep
                raise dead_engine()
            began_s = time.monotonic()
            try:
                self.file.tell("waiting")
                await self.hold.take()
                had_card_s = time.monotonic()
                await self._memory_is_back()
                await self.engine.wake_up()
            except Exception:
                self._fail("wake")
                raise dead_engine() from None
            self.sleeps = False
            self.file.tell("awake")
            log.info("the engine is awake: %.1f s for its card, %.1f s to wake", had_card_s - began_s, time.monotonic() - had_card_s)

    def _fail(self, what: str) -> None:
        log.exception("the engine does not %s; its replica ends, and Serve starts another", what)
        self.has_failed = True

    async def _memory_is_back(self) -> None:
        """Wait until the GPU has as much free memory as the engine gave back: who had the card may still be ending.

        Not for ever: an engine that finds too little does not wake, and says so.
        """
        until_s = time.monotonic() + MEMORY_WITHIN_S
        while gpu_free_bytes() < self.freed_bytes and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_EVERY_S)


def gpu_free_bytes() -> int:
    """Return the free memory of this process's GPU; 0 without one, or where its driver tells nothing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]))
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except (ImportError, KeyError, ValueError):
        return 0
    except pynvml.NVMLError:
        return 0
