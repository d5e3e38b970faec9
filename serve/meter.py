"""Counts the tokens of an answer as it passes, from the usage that vLLM states, without making anything wait.

Does not know who pays, nor the shapes of answers and events: see `serve.protocols`.
"""

import json
from typing import Any

from serve.protocols import Protocol
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
        self._pieces: list[bytes] = []
        self._num_events = 0
        self._stated_tokens: int | None = None

    def passes(self, message: Message) -> bool:
        """Take note of a message to the client; return whether the client is to see it."""
        body: bytes = message.get("body", b"")
        if not body:
            return True
        if not self.is_stream:
            self._pieces.append(body)
            return True
        self._num_events += self.protocol.token_mark in body
        if self.protocol.usage_mark not in body:
            return True
        self._stated_tokens = self._total(body.partition(b"data:")[2])
        return self.shows_usage or self._stated_tokens is None

    def num_tokens(self, num_prompt_tokens: int) -> int:
        """Return the tokens of prompt and answer so far; `num_prompt_tokens` is a guess for where none are stated."""
        stated = self._stated_tokens if self.is_stream else self._total(b"".join(self._pieces))
        return num_prompt_tokens + self._num_events if stated is None else stated

    def _total(self, answer: bytes) -> int | None:
        try:
            return self.protocol.num_tokens(json.loads(answer))
        except ValueError:
            return None
