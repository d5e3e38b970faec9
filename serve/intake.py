"""The way of requests into the engine, a few at a time.

Until the engine has a request, it takes several turns of the loop: its route, its template, its tokens from a thread. Where many come at
once, each such turn would be one of all of them, and the engine, idle, would get the first when half of them could be there. Knows
neither HTTP nor the engine, which tells by `reached` that it has the request of the task that calls it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

NUM_AT_ONCE = 4
HELD_AT_MOST_S = 0.05  # a long prompt, or an adapter that the engine must load, keeps nobody waiting

_leave: ContextVar[Callable[[], None]] = ContextVar("leave")


class Intake:
    """Whose turn it is."""

    def __init__(self, num_at_once: int = NUM_AT_ONCE) -> None:
        self._turns = asyncio.Semaphore(num_at_once)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the engine has the request, it ends before that, or it has had it too long."""
        await self._turns.acquire()
        has_turn = True

        def leave() -> None:
            nonlocal has_turn
            if has_turn:
                has_turn = False
                self._turns.release()

        too_long = asyncio.get_running_loop().call_later(HELD_AT_MOST_S, leave)
        _leave.set(leave)
        try:
            yield
        finally:
            too_long.cancel()
            leave()


def reached() -> None:
    """Give the turn to the next: the engine has this task's request, if it waited for a turn."""
    leave = _leave.get(None)
    if leave is not None:
        leave()
