"""Follows an answer as it passes, without making anything wait: when it began, and its tokens, from the usage that vLLM states.

Does not know who pays, nor the shapes of answers and events: see `serve.protocols`.
"""

import json
from time import perf_counter
from typing import Any

from serve.protocols import Protocol, Usage
from serve.refusal import Message


class Meter:
    """Follows one answer. One that the client leaves has stated nothing: of a stream the events are counted, of others the prompt alone."""

    def __init__(self, request: dict[str, Any], protocol: Protocol) -> None:
        """Ask vLLM to state the usage in a stream too; one that the client did not ask for is kept from it."""
        self.protocol, self.is_stream = protocol, request.get("stream") is True
        options = request.get("stream_options")
        asks = isinstance(options, dict) and options.get("include_usage") is True
        self.shows_usage = asks or not protocol.usage_is_asked_for
        if self.is_stream and protocol.usage_is_asked_for and (options is None or isinstance(options, dict)):
            request["stream_options"] = {**(options or {}), "include_usage": True} if self.shows_usage else {"include_usage": True}
        self.num_events = 0
        self.first_s: float | None = None
        """When a stream's first piece came, on the clock of `perf_counter`; None for one that comes whole."""
        self._pieces: list[bytes] = []
        self._stated: Usage | None = None

    def passes(self, message: Message) -> bool:
        """Take note of a message to the client; return whether the client is to see it."""
        body: bytes = message.get("body", b"")
        if not body:
            return True
        if not self.is_stream:
            self._pieces.append(body)
            return True
        if self.protocol.token_mark in body:
            self.num_events += 1
            if self.first_s is None:
                self.first_s = perf_counter()
        if self.protocol.usage_mark not in body:
            return True
        self._stated = self._read(body.partition(b"data:")[2])
        return self.shows_usage or self._stated is None

    def usage(self) -> Usage | None:
        """Return the tokens that were stated, if they were."""
        if self._stated is None and self._pieces:
            self._stated = self._read(b"".join(self._pieces))
            self._pieces.clear()
        return self._stated

    def num_tokens(self, num_prompt_tokens: int) -> int:
        """Return the tokens of prompt and answer so far; `num_prompt_tokens` is a guess for where none are stated."""
        stated = self.usage()
        return num_prompt_tokens + self.num_events if stated is None else sum(stated)

    def _read(self, answer: bytes) -> Usage | None:
        try:
            return self.protocol.usage(json.loads(answer))
        except (ValueError, RecursionError):
            return None
