"""What stands before vLLM's application: keys, only the routes that are meant, names that mean versions, errors in OpenAI's shape.

Pure ASGI: a stream passes through untouched. Knows HTTP and names. Does not know the engine.
"""

import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from configs.errors import AccessError
from serve.adapters import Adapters, BrokenAdapterError, UnknownNameError
from serve.keys import Key, KeyFile

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MODEL_HEADER = b"x-tandem-model"
# Ours are made anew, and a key is nothing that the engine should see.
HEADERS_KEPT_BACK = frozenset({b"content-length", b"transfer-encoding", b"authorization", MODEL_HEADER})


log = logging.getLogger("tandem.serve")


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param, self.code = status, kind, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code or self.status}}


class Front:
    """Wraps vLLM's application."""

    def __init__(self, app: App, adapters: Adapters, keys: KeyFile, max_body_bytes: int) -> None:
        self.app, self.adapters, self.keys, self.max_body_bytes = app, adapters, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on to vLLM."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._route(scope, receive, send)
        except RefusedError as refusal:
            await _send_json(send, refusal.status, refusal.body())

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/health" and method == "GET":
            await self.app(scope, receive, send)
            return
        key = self._authorize(scope)
        if path in GENERATE_PATHS:
            if method != "POST":
                raise RefusedError(405, "invalid_request_error", f"{path} takes POST, not {method}")
            await self._generate(key, scope, receive, send)
        elif path == "/v1/models" and method == "GET":
            await _send_json(send, 200, {"object": "list", "data": [_model_card(name) for name in self._names(key)]})
        else:
            raise RefusedError(404, "invalid_request_error", f"no such route: {method} {path}")

    def _authorize(self, scope: Scope) -> Key | None:
        """Return the key that the request shows; None where none is asked for.

        The file is looked at for each request, which takes microseconds: a revoked key is out at once, on every replica.
        """
        try:
            if not self.keys.are_asked_for():
                return None
        except AccessError as error:
            log.error("%s", error)
            raise RefusedError(503, "service_unavailable", "keys cannot be checked now") from None
        kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise RefusedError(
                401, "invalid_request_error", "this endpoint asks for a key: Authorization: Bearer KEY", code="invalid_api_key"
            )
        key = self.keys.find(secret.strip())
        if key is None or not key.is_valid():
            reason = "is unknown" if key is None else "was revoked" if key.revoked else "has expired"
            raise RefusedError(401, "invalid_request_error", f"the key {reason}", code="invalid_api_key")
        return key

    def _names(self, key: Key | None) -> list[str]:
        return [name for name in self.adapters.names() if key is None or key.may_use(name)]

    async def _generate(self, key: Key | None, scope: Scope, receive: Receive, send: Send) -> None:
        request = _parse(await self._read_body(receive))
        name = request.get("model")
        if not isinstance(name, str) or not name:
            known = ", ".join(self._names(key)[:10])
            raise RefusedError(400, "invalid_request_error", f"you must name a model; there are: {known}", "model")
        if key is not None and not key.may_use(name):
            raise self._unknown(name, key)
        request["model"] = version = await self._resolve(name, key)
        self._add_system_prompt(request, version)
        body = json.dumps(request).encode()  # ASCII: half a surrogate pair has no UTF-8
        headers = [(name, value) for name, value in scope["headers"] if name not in HEADERS_KEPT_BACK]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (MODEL_HEADER, version.encode())]}
            await send(message)

        await self.app(scope, _replay(body, receive), send_named)

    def _add_system_prompt(self, request: dict[str, Any], version: str) -> None:
        """Begin a conversation as the version was trained to: with its own system message, unless the request brings one."""
        messages, prompt = request.get("messages"), self.adapters.system_prompt(version)
        if not prompt or not isinstance(messages, list) or not messages:
            return
        first = messages[0]
        if isinstance(first, dict) and first.get("role") in ("system", "developer"):
            return
        request["messages"] = [{"role": "system", "content": prompt}, *messages]

    async def _resolve(self, name: str, key: Key | None) -> str:
        try:
            return await self.adapters.resolve(name)
        except UnknownNameError:
            raise self._unknown(name, key) from None
        except BrokenAdapterError as error:
            raise RefusedError(400, "invalid_request_error", f"The model `{name}` cannot be served: {error}", "model") from None

    def _unknown(self, name: str, key: Key | None) -> RefusedError:
        """Say the same of a name that is not there and of one that the key does not open."""
        known = ", ".join(self._names(key)[:10]) or "none that this key may use"
        return RefusedError(404, "not_found_error", f"The model `{name[:100]}` does not exist. There are: {known}", "model")

    async def _read_body(self, receive: Receive) -> bytes:
        chunks, num_bytes, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "invalid_request_error", "the client went away")
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            if num_bytes > self.max_body_bytes:
                raise RefusedError(413, "invalid_request_error", f"the body is over {self.max_body_bytes} bytes (serve.max_body_bytes)")
            more = message.get("more_body", False)
        return b"".join(chunks)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "invalid_request_error", f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RefusedError(400, "invalid_request_error", "the body is not a JSON object")
    return request


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, and then whatever comes after it (a client that goes away)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tandem"}


async def _send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
