"""An engine that has died: requests are refused as worth another try, and its replica ends at once, so that Serve starts another.

Pure ASGI, between the front, which sees and logs these refusals as its own, and the engine's application. Knows that an engine tells
whether it has died. Does not know why, or what is asked.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from serve.protocols import error_body
from serve.refusal import UNAVAILABLE, App, Message, Receive, RefusedError, Scope, Send, send_json, send_nothing

LOOK_EVERY_S = 1.0
RETRY_S = 1

log = logging.getLogger("tandem.serve")


class Alive:
    """Wraps an application; while its engine lives, it changes nothing."""

    def __init__(self, app: App, has_died: Callable[[], bool]) -> None:
        self.app, self.has_died = app, has_died

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, or refuse; what the engine was at when it died is refused too, where its answer had not begun."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_refused = False

        def send_or_refuse(message: Message) -> Awaitable[None]:
            nonlocal is_refused
            if message["type"] == "http.response.start" and message["status"] == 500 and self.has_died():
                is_refused = True
                return _refuse(scope, send)
            return send_nothing() if is_refused else send(message)

        if self.has_died():
            await _refuse(scope, send)
        else:
            await self.app(scope, receive, send_or_refuse)

    def openapi(self) -> dict[str, Any]:
        """Return what the application says of itself."""
        description: dict[str, Any] = self.app.openapi()  # type: ignore[attr-defined]
        return description


def dead_engine() -> RefusedError:
    """Return the refusal of what would ask an engine that has died."""
    return RefusedError(503, "the engine has died, and another starts; try again", kind=UNAVAILABLE).after(RETRY_S)


async def _refuse(scope: Scope, send: Send) -> None:
    refusal = dead_engine()
    await send_json(send, refusal.status, error_body(scope["path"], refusal), refusal.headers)


async def leave_with(has_died: Callable[[], bool], last_words: Callable[[], None]) -> None:
    """End this process when its engine has died: Serve sees that at once, and an engine that fails its checks only after some of them."""
    while not has_died():
        await asyncio.sleep(LOOK_EVERY_S)
    log.error("the engine has died; its replica ends, and Serve starts another")
    await asyncio.sleep(LOOK_EVERY_S)  # its requests are told
    await asyncio.to_thread(last_words)
    os._exit(1)
