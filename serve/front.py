"""What stands before vLLM's application: keys and quotas, only the routes that are meant, names that mean versions, a bounded queue.

Pure ASGI: a stream passes through piece by piece. Knows HTTP and names. Does not know the engine.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from configs.errors import AccessError
from configs.schema import ServeConfig
from serve.adapters import Adapters, BrokenAdapterError, UnknownNameError
from serve.alive import dead_engine
from serve.body import dump, read_json, replay
from serve.bounds import check_bounds
from serve.completion_ids import ID_HEADER, request_id_of
from serve.feedback import FeedbackDesk
from serve.intake import Intake
from serve.keys import Key, KeyFile, is_operator
from serve.last_words import LastWords, straight, stream_beginner
from serve.meter import Meter
from serve.observed import Observed, Watch
from serve.openapi import describe
from serve.page import FILES, send_page
from serve.protocols import ANTHROPIC_KEY_HEADER, PROTOCOLS, error_body, with_bearer
from serve.quotas import Admission, QuotaError, Quotas, quotas_of
from serve.refusal import (
    RETRY_S,
    UNAVAILABLE,
    App,
    Headers,
    Message,
    Receive,
    RefusedError,
    Scope,
    Send,
    as_http,
    engine_lost,
    send_json,
)

FEEDBACK_PATH = "/v1/feedback"
MODEL_HEADER = b"x-tandem-model"
LETTERS_A_TOKEN = 4  # of English; a guess that is set right by the usage that the engine states
MAX_HEADER_BYTES = 64 * 1024  # the server before us knows no bound
# Ours are made anew, a key is nothing that the engine should see, and by vLLM's own a client could jump the queue.
OURS = {b"content-length", b"transfer-encoding", b"authorization", ANTHROPIC_KEY_HEADER, MODEL_HEADER}
HEADERS_KEPT_BACK = frozenset(OURS | {b"x-vllm-priority", b"x-data-parallel-rank"})
ROUTES = frozenset({*PROTOCOLS, *FILES, FEEDBACK_PATH, "/v1/models", "/health", "/openapi.json", "/page.json"})
OTHER = "other"
LAST_WORDS = {
    path: LastWords(as_http(engine_lost(), protocol.error_body(engine_lost())), protocol.error_event(engine_lost()))
    for path, protocol in PROTOCOLS.items()
}


log = logging.getLogger("tandem.api")


@dataclass(frozen=True)
class Doors:
    """Who may come in, how much they may ask, and whether there is still an engine to ask."""

    keys: KeyFile
    quotas: Quotas
    engine_has_died: Callable[[], bool] = bool
    awake: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Keeps the engine from sleep; who asks one that sleeps waits here until it is awake."""


class Front:
    """Wraps vLLM's application."""

    def __init__(self, app: App, adapters: Adapters, doors: Doors, feedback: FeedbackDesk, config: ServeConfig) -> None:
        self.app, self.adapters, self.doors, self.feedback, self.config = app, adapters, doors, feedback, config
        self.watch, self.intake = Watch(), Intake()
        self.num_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on to vLLM."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, path = dict(scope["headers"]), scope["path"]
        seen = Observed(request_id_of(headers.get(ID_HEADER, b"")), scope["method"], path if path in ROUTES else OTHER)
        to_client = straight(scope, send)
        send, receive = seen.follow(to_client), seen.heed(receive)
        try:
            await self._route(scope, receive, send, seen)
        except RefusedError as refusal:
            await send_json(send, refusal.status, error_body(path, refusal), refusal.headers)
        except Exception as error:
            log.exception("a request failed", extra={"fields": {"request_id": seen.request_id}})
            failure = RefusedError(500, f"the endpoint failed ({type(error).__name__}); its log says more", kind="server_error")
            if not seen.status:
                await send_json(send, failure.status, error_body(path, failure))
            elif seen.is_streaming:  # straight to the client: what follows the answer may be what failed
                await to_client({"type": "http.response.body", "body": PROTOCOLS[path].error_event(failure)})
            else:  # a connection that breaks is all that can tell it now
                raise
        finally:
            self.watch.end(seen)

    async def _route(self, scope: Scope, receive: Receive, send: Send, seen: Observed) -> None:
        method, path = scope["method"], scope["path"]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise RefusedError(431, f"the headers are over {MAX_HEADER_BYTES} bytes")
        if path == "/health" and method == "GET":
            await self.app(scope, receive, send)
            return
        if path in FILES and method == "GET":
            await send_page(path, send)
            return
        if path == "/page.json" and method == "GET":
            await send_json(send, 200, self.feedback.told())
            return
        scope = with_bearer(scope)
        key = self._authorize(scope)
        seen.key_name = key.name if key else None
        if path in PROTOCOLS or path == FEEDBACK_PATH:
            if method != "POST":
                raise RefusedError(405, f"{path} takes POST, not {method}")
            if path == FEEDBACK_PATH:
                await self.feedback.take(await read_json(receive, self.config.max_body_bytes), key, send)
            else:
                await self._generate(key, scope, receive, send, seen)
        elif path == "/v1/models" and method == "GET":
            await send_json(send, 200, {"object": "list", "data": [self._model_card(name) for name in self._names(key)]})
        elif path == "/openapi.json" and method == "GET":
            await send_json(send, 200, await asyncio.to_thread(describe, self.app))  # half a second, the first time
        elif path == "/v1/embeddings":
            raise RefusedError(404, f"no such route: {path}; {self.adapters.base.name} generates text, and makes no embeddings")
        else:
            raise RefusedError(404, f"no such route: {method} {path}")

    def _authorize(self, scope: Scope) -> Key | None:
        """Return the key that the request shows; None where none is asked for, and it is not the operator who asks.

        A revoked key is out in a moment, on every replica: `KeyFile` looks at its file again and again.
        """
        kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        try:
            key = self.doors.keys.find(secret.strip())
            is_asked_for = self.doors.keys.are_asked_for()
        except AccessError as error:
            log.error("%s", error)
            raise RefusedError(503, "keys cannot be checked now", kind=UNAVAILABLE).after(RETRY_S) from None
        if not is_asked_for:
            return key if is_operator(key) else None
        if kind.lower() != "bearer" or not secret:
            raise RefusedError(401, "this endpoint asks for a key: Authorization: Bearer KEY", code="invalid_api_key")
        if key is None or not key.is_valid():
            reason = "is unknown" if key is None else "was revoked" if key.revoked else "has expired"
            raise RefusedError(401, f"the key {reason}", code="invalid_api_key")
        return key

    def _names(self, key: Key | None) -> list[str]:
        return [name for name in self.adapters.names() if key is None or key.may_use(name)]

    async def _generate(self, key: Key | None, scope: Scope, receive: Receive, send: Send, seen: Observed) -> None:
        if self.doors.engine_has_died():  # before it costs a key anything of its quota
            raise dead_engine()
        request = await read_json(receive, self.config.max_body_bytes)
        name = request.get("model")
        if not isinstance(name, str) or not name:
            known = ", ".join(self._names(key)[:10])
            raise RefusedError(400, f"you must name a model; there are: {known}", param="model")
        if key is not None and not key.may_use(name):
            raise self._unknown(name, key)
        protocol = PROTOCOLS[scope["path"]]
        with self._places(check_bounds(request, protocol, self.config)):
            owner = key.sha256 if key else ""
            version = await self._resolve(name, key, lambda: protocol.conversation(scope, request, owner))
            request["model"] = version
            completion_id = self.feedback.ids.make(version, key, seen.request_id)
            scope = _with_id(scope, completion_id)
            seen.version, seen.completion_id, seen.meter = version, completion_id, Meter(request, protocol)
            seen.prompt = request.get(protocol.turns or "prompt")
            self.watch.begin(completion_id)
            with self.feedback.listening(send, request, key, protocol) as send_heard:
                protocol.put_id(request, completion_id)
                protocol.add_system_prompt(request, self.adapters.system_prompt(version))
                begun = stream_beginner(scope) if request.get("stream") is True else None
                # A turn comes last: nobody waits in it for the registry, a quota or an engine that wakes.
                async with self._counted(key, request, seen.meter) as standing, self.doors.awake(), self.intake.turn():
                    send_named = _with_headers(send_heard, [(MODEL_HEADER, version.encode()), *standing], begun)
                    await self._hand_on(request, scope, receive, send_named)

    def _model_card(self, name: str) -> dict[str, Any]:
        """Say what OpenAI says of a model; in `root`, as vLLM does, what answers by its name now, and on which precision of the base."""
        card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tandem"}
        return card | {"root": self.adapters.meaning(name), "quantization": self.config.quantization}

    @asynccontextmanager
    async def _counted(self, key: Key | None, request: dict[str, Any], meter: Meter) -> AsyncIterator[Headers]:
        """Count a request, and at its end its tokens, by its key's quotas; give the headers that tell how they stand."""
        if key is None or not quotas_of(key):
            yield []
            return
        # A key without a quota of tokens pays no guess, and its request is not written out for one.
        guessed_tokens = max(1, len(dump(request)) // LETTERS_A_TOKEN) if key.tpm is not None else 0
        headers = _quota_headers(await self._admit(key, guessed_tokens))
        try:
            yield headers
        finally:
            if key.tpm is not None:
                self.doors.quotas.spend(key, max(0, meter.num_tokens(guessed_tokens) - guessed_tokens))

    async def _hand_on(self, request: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        body = dump(request)
        kept = [(name, value) for name, value in scope["headers"] if name not in HEADERS_KEPT_BACK]
        scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        await self.app(scope, replay(body, receive), send)

    @contextmanager
    def _places(self, num_answers: int) -> Iterator[None]:
        """Take places among those that the engine computes or that wait for it; refuse where too few are free."""
        if self.num_in_flight + num_answers > self.config.max_num_seqs + self.config.max_waiting_requests:
            message = f"{self.num_in_flight} answers are computed or wait already (serve.max_waiting_requests)"
            raise RefusedError(503, message, kind=UNAVAILABLE, code="overloaded").after(RETRY_S)
        self.num_in_flight += num_answers
        try:
            yield
        finally:
            self.num_in_flight -= num_answers

    async def _admit(self, key: Key, num_tokens: int) -> Admission:
        try:
            admission = await self.doors.quotas.take(key, num_tokens)
        except QuotaError as error:
            log.error("quotas cannot be counted: %s", error)
            raise RefusedError(503, "quotas cannot be counted now", kind=UNAVAILABLE).after(RETRY_S) from None
        if admission.spent:
            limit = admission.standings[admission.spent].limit
            message = f"the key {key.name} may use {limit} {admission.spent} a minute; try again in {admission.retry_s} s"
            refusal = RefusedError(429, message, kind=admission.spent, code="rate_limit_exceeded").after(admission.retry_s)
            refusal.headers += _quota_headers(admission)
            raise refusal
        return admission

    async def _resolve(self, name: str, key: Key | None, conversation: Callable[[], str]) -> str:
        try:
            return await self.adapters.resolve(name, conversation)
        except UnknownNameError:
            raise self._unknown(name, key) from None
        except BrokenAdapterError as error:
            raise RefusedError(400, f"The model `{name}` cannot be served: {error}", param="model") from None

    def _unknown(self, name: str, key: Key | None) -> RefusedError:
        """Say the same of a name that is not there and of one that the key does not open."""
        known = ", ".join(self._names(key)[:10]) or "none that this key may use"
        return RefusedError(404, f"The model `{name[:100]}` does not exist. There are: {known}", kind="not_found_error", param="model")


def _with_id(scope: Scope, completion_id: str) -> Scope:
    """Take the place of the client's own request id."""
    others = [(name, value) for name, value in scope["headers"] if name != ID_HEADER]
    return {**scope, "headers": [*others, (ID_HEADER, completion_id.encode())]}


def _with_headers(send: Send, headers: Headers, begun: Callable[[], None] | None = None) -> Send:
    """Give a `send` that adds headers, and calls `begun` when a good answer has begun."""

    def send_named(message: Message) -> Awaitable[None]:
        return send_start(message) if message["type"] == "http.response.start" else send(message)

    async def send_start(message: Message) -> None:
        await send({**message, "headers": [*message.get("headers", []), *headers]})
        if begun and message["status"] == 200:
            begun()

    return send_named


def _quota_headers(admission: Admission) -> Headers:
    """Say how a key's quotas stand, in OpenAI's headers."""
    headers = {}
    for kind, standing in admission.standings.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(standing.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(standing.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(standing.reset_s)}s"
    return [(name.encode(), value.encode()) for name, value in headers.items()]
