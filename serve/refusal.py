"""How a request is refused: a status, and an error in the shape that OpenAI's client understands.

Knows HTTP. Does not know why a request is refused.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
# Those of ours that stand before another's are plain functions, which hand back what it gives to be awaited: as a coroutine each would
# cost a streamed piece more than all that is done in it.
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable"
RETRY_S = 1


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers: Headers = []

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code or self.status}}

    def after(self, seconds: int) -> "RefusedError":
        """Say when to try again; OpenAI's client waits so long before it does."""
        self.headers.append((b"retry-after", str(seconds).encode()))
        return self


def engine_lost() -> RefusedError:
    """Return the error for what was under way on an engine that has died."""
    return RefusedError(503, "the engine was lost while it answered; ask again", kind=UNAVAILABLE, code="engine_lost").after(RETRY_S)


def as_http(refusal: RefusedError, body: dict[str, Any]) -> bytes:
    """Return a refusal as it stands on a connection, which ends with it."""
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        *refusal.headers,
        (b"content-length", b"%d" % len(content)),
        (b"connection", b"close"),
    ]
    status = b"HTTP/1.1 %d %b" % (refusal.status, HTTPStatus(refusal.status).phrase.encode())
    return b"\r\n".join([status, *(b"%b: %b" % header for header in headers), b"", content])


async def send_nothing() -> None:
    """Stand for the sending of what a client is not to see."""


async def send_json(send: Send, status: int, content: dict[str, Any], headers: Headers | None = None) -> None:
    """Send a whole answer as JSON."""
    await send_whole(send, status, json.dumps(content).encode(), [(b"content-type", b"application/json"), *(headers or [])])


async def send_whole(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Send an answer whose body is all there."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
