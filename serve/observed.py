"""What is seen of each request as it passes: one record, of which logs and metrics are made.

The front begins an `Observed` for each request, tells it who asks and which version answers, and lets the answer pass through it. At
the request's end, whatever that is, the front hands the record to each of `Watch.observers`. An observer is a function of one record;
it runs in the loop that answers, so it is quick, and a replica has it wait for a quieter moment: where many answers end at once, as many
requests come in their place. Of a streamed piece it is only seen whether it is the first, or the usage.

Knows ASGI's messages. Does not know where what was seen goes.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter, time
from typing import Any

from serve.completion_ids import nonce_of
from serve.meter import Meter
from serve.refusal import Message, Receive, Send, send_nothing

log = logging.getLogger("tandem.api")

NUM_TOLD_AT_ONCE = 8  # about a millisecond, for which no piece of an answer goes out
CLIENT_LEFT = 499  # as web servers note one who went away before the answer began


@dataclass(frozen=True)
class EngineTimes:
    """What the engine itself says of one request, on its own clock; of several answers the sums, and the longest times."""

    queue_s: float
    """From its arrival in the engine until it was first computed."""
    prefill_s: float
    """From then to the first token."""
    decode_s: float
    """From the first token to the last."""
    num_prompt_tokens: int
    num_answer_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.queue_s + self.prefill_s

    @property
    def tpot_s(self) -> float | None:
        """Time for each token after the first; None where there is none."""
        return self.decode_s / (self.num_answer_tokens - 1) if self.num_answer_tokens > 1 else None


class Observed:
    """One request, as far as it is."""

    def __init__(self, request_id: str, method: str, route: str) -> None:
        self.request_id, self.method = request_id, method
        """The request's one id: of its `X-Request-Id`, or new; the completion's id begins with it."""
        self.route = route
        """One of the front's own paths, or `other`: few, whatever clients ask for."""
        self.key_name: str | None = None
        """Name of the key that was shown; None without one."""
        self.version: str | None = None
        """What answers, such as `helpdesk:2`; None for what asks no engine, or was refused before."""
        self.completion_id: str | None = None
        self.prompt: Any = None
        """What is asked, as the client wrote it: for an operator who wants it in the log, and nothing else."""
        self.status = 0
        """Of HTTP; `CLIENT_LEFT` for one who went away before the answer began."""
        self.is_whole = False
        """Whether the answer was sent to its end."""
        self.began_s = perf_counter()
        self.ended_s = self.began_s
        self.meter: Meter | None = None
        """Follows the answer of an engine."""
        self.engine: EngineTimes | None = None
        """None where no engine was asked, it was stopped before its end, or its vLLM does not tell."""

    def follow(self, send: Send) -> Send:
        """Return a `send` that takes note of what passes, and keeps a usage from a client that did not ask for it."""

        def send_seen(message: Message) -> Awaitable[None]:
            if not self.status and message["type"] == "http.response.start":
                self.status = message["status"]
            elif not message.get("more_body", False):
                self.is_whole = self.status != CLIENT_LEFT
            if self.meter is None or self.meter.passes(message):
                return send(message)
            return send_nothing()

        return send_seen

    def heed(self, receive: Receive) -> Receive:
        """Return a `receive` that takes note of a client who goes away before the answer has begun."""

        async def receive_seen() -> Message:
            message = await receive()
            if not self.status and message["type"] == "http.disconnect":
                self.status = CLIENT_LEFT
            return message

        return receive_seen

    def end(self) -> None:
        """Take note of the end."""
        self.ended_s = perf_counter()
        self.status = self.status or CLIENT_LEFT

    @property
    def ended(self) -> datetime:
        """When it ended, which may be told a little later."""
        return datetime.fromtimestamp(time() - (perf_counter() - self.ended_s), UTC)

    @property
    def is_streaming(self) -> bool:
        """Whether a stream has begun, and not ended: its client still takes an event."""
        return self.status == 200 and not self.is_whole and self.meter is not None and self.meter.is_stream

    @property
    def duration_s(self) -> float:
        """From the request's arrival to the answer's end."""
        return self.ended_s - self.began_s

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token as the client sees it; None for an answer that came whole."""
        first_s = self.meter.first_s if self.meter else None
        return None if first_s is None else first_s - self.began_s

    @property
    def tpot_s(self) -> float | None:
        """Time for each token after the first as the client sees it; None for an answer that came whole, or of one token."""
        first_s, num_tokens = self.meter.first_s if self.meter else None, self.num_answer_tokens or 0
        return None if first_s is None or num_tokens < 2 else (self.ended_s - first_s) / (num_tokens - 1)

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens in; None where they were not stated."""
        usage = self.meter.usage() if self.meter else None
        return usage.num_prompt_tokens if usage else None

    @property
    def num_answer_tokens(self) -> int | None:
        """Tokens out; of a stream that broke off its events, and None where nothing is known."""
        if self.meter is None:
            return None
        usage = self.meter.usage()
        return usage.num_answer_tokens if usage else self.meter.num_events or None


Observer = Callable[[Observed], None]


@dataclass
class Watch:
    """Who is told of requests, and what the engine tells of those under way."""

    observers: list[Observer] = field(default_factory=list)
    later_s: float = 0.0
    """So long after a request's end it is told of."""
    _ended: deque[Observed] = field(default_factory=deque)
    _under_way: dict[str, EngineTimes | None] = field(default_factory=dict)

    def begin(self, completion_id: str) -> None:
        """Take what the engine will say of this one."""
        self._under_way[completion_id.partition(".")[0]] = None

    def note(self, engine_id: str, times: EngineTimes) -> None:
        """Take what the engine says of a request, or of one of its answers, at its end."""
        nonce = nonce_of(engine_id)
        if nonce is None or nonce not in self._under_way:
            return
        so_far = self._under_way[nonce]
        self._under_way[nonce] = _together(so_far, times) if so_far else times

    def end(self, seen: Observed) -> None:
        """Complete a record, and hand it to all, now or later."""
        seen.end()
        if seen.completion_id:
            seen.engine = self._under_way.pop(seen.completion_id.partition(".")[0], None)
        self._ended.append(seen)
        if not self.later_s:
            self.tell()
        elif len(self._ended) == 1:
            asyncio.get_running_loop().call_later(self.later_s, self._tell_some)

    def tell(self) -> None:
        """Hand on all that ended and was not told of yet."""
        while self._ended:
            self._tell_next()

    def _tell_some(self) -> None:
        for _ in range(min(len(self._ended), NUM_TOLD_AT_ONCE)):
            self._tell_next()
        if self._ended:
            asyncio.get_running_loop().call_soon(self._tell_some)

    def _tell_next(self) -> None:
        seen = self._ended.popleft()
        for observer in self.observers:
            try:
                observer(seen)
            except Exception:  # no answer fails for what is told of it
                log.exception("a request could not be told of")


def _together(one: EngineTimes, other: EngineTimes) -> EngineTimes:
    return EngineTimes(
        max(one.queue_s, other.queue_s),
        max(one.prefill_s, other.prefill_s),
        max(one.decode_s, other.decode_s),
        max(one.num_prompt_tokens, other.num_prompt_tokens),
        one.num_answer_tokens + other.num_answer_tokens,
    )
