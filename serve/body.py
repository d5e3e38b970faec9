"""A request's body: read whole, as JSON, within bounds; written again for the engine.

Knows ASGI's messages. Does not know what a body says.
"""

import asyncio
import json
from typing import Any

from serve.refusal import Message, Receive, RefusedError

BODY_TIMEOUT_S = 60.0
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


async def read_json(receive: Receive, max_bytes: int) -> dict[str, Any]:
    """Read a body that is one JSON object.

    Raises:
        RefusedError: It is none, or too large, or does not come.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read(receive, max_bytes)
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {BODY_TIMEOUT_S:.0f} s") from None
    return _parse(body)


def dump(request: dict[str, Any]) -> bytes:
    """Write a request as JSON.

    Raises:
        RefusedError: It has what JSON or UTF-8 cannot say, or is nested too deeply.
    """
    try:
        return ENCODER.encode(request).encode()
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise RefusedError(400, "the body has half a surrogate pair, which stands for no letter") from None
    except ValueError:
        raise RefusedError(400, "the body has a number that JSON does not know: NaN or one without end") from None


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then whatever comes after it (a client that goes away)."""
    given = False

    async def replay_once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay_once


async def _read(receive: Receive, max_bytes: int) -> bytes:
    chunks, num_bytes, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the client went away")
        chunks.append(message.get("body", b""))
        num_bytes += len(chunks[-1])
        if num_bytes > max_bytes:
            raise RefusedError(413, f"the body is over {max_bytes} bytes (serve.max_body_bytes)")
        more = message.get("more_body", False)
    return b"".join(chunks)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return request
