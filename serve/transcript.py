"""One chat as it passes to the client: what was asked, and the pieces of the answer.

Knows the shape of answers of /v1/chat/completions, whole and streamed. Does not know where they are kept.
"""

import json
from typing import Any

from serve.refusal import Message, Send

MAX_ANSWER_BYTES = 4 * 2**20
EVENT = b"data: "


class Transcript:
    """Collects an answer; it is read only when all of it has passed, and not by the one who passes it on."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_answer = False

    def follow(self, send: Send) -> Send:
        """Return a `send` that lets the client have each message first."""

        async def send_heard(message: Message) -> None:
            await send(message)
            self._hear(message)

        return send_heard

    @property
    def num_bytes(self) -> int:
        """What it holds in memory, about: the conversation, and the answer so far."""
        return self._num_bytes + len(json.dumps(self.messages))

    def row(self) -> dict[str, Any] | None:
        """Return the messages, and the answer with its id; None where nothing was answered, or more than is kept."""
        if not self._is_answer or self._num_bytes > MAX_ANSWER_BYTES:
            return None
        try:
            answer = _read(b"".join(self._pieces))
        except (ValueError, KeyError, IndexError):  # a whole answer that the client did not wait for
            return None
        if not answer["answer"] and not answer["finish_reason"]:  # stopped before its first word
            return None
        return {"messages": self.messages, **answer}

    def _hear(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_answer = message["status"] == 200
        elif self._is_answer and self._num_bytes <= MAX_ANSWER_BYTES:
            piece: bytes = message.get("body", b"")
            self._pieces.append(piece)
            self._num_bytes += len(piece)


def _read(body: bytes) -> dict[str, Any]:
    """Put together the first choice of an answer; one that was stopped on the way has no reason for its end."""
    events = [json.loads(line.removeprefix(EVENT)) for line in body.split(b"\n") if line.startswith(EVENT + b"{")]
    parts = events or [json.loads(body)]
    text, finish_reason = "", None
    for choice in (choice for part in parts for choice in part.get("choices", []) if choice["index"] == 0):
        text += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        finish_reason = choice.get("finish_reason") or finish_reason
    return {"completion_id": parts[0]["id"], "answer": text, "finish_reason": finish_reason}
