"""One chat as it passes to the client: what was asked, and the pieces of the answer.

Knows the shapes of answers, whole and streamed, as OpenAI and Anthropic write them. Does not know where they are kept.
"""

import json
from collections.abc import Callable
from typing import Any

from serve.refusal import Message, Send

MAX_ANSWER_BYTES = 4 * 2**20
EVENT = b"data: "
# Reasons for an answer's end, in the words of chats.
ENDS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
ENDS_OF_RESPONSES = {"completed": "stop", "incomplete": "length"}
Reader = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Transcript:
    """Collects an answer; it is read only when all of it has passed, and not by the one who passes it on."""

    def __init__(self, messages: list[Any], reader: Reader) -> None:
        self.messages, self.reader = messages, reader
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
            answer = self.reader(_parts(b"".join(self._pieces)))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # a whole answer that the client did not wait for
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


def _parts(body: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream, or the whole answer as the only part."""
    events = [json.loads(line.removeprefix(EVENT)) for line in body.split(b"\n") if line.startswith(EVENT + b"{")]
    return events or [json.loads(body)]


def read_chat(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together the first choice of an answer; one that was stopped on the way has no reason for its end."""
    text, reason = "", None
    for choice in (choice for part in parts for choice in part.get("choices", []) if choice["index"] == 0):
        text += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        reason = choice.get("finish_reason") or reason
    return {"completion_id": parts[0]["id"], "answer": text, "finish_reason": reason}


def read_message(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together the texts of one of Anthropic's messages."""
    first = parts[0].get("message") or parts[0]
    deltas = [part.get("delta") or {} for part in parts]
    text = "".join(piece.get("text") or "" for piece in [*first.get("content", []), *deltas])
    reason = next((delta["stop_reason"] for delta in deltas if delta.get("stop_reason")), first.get("stop_reason"))
    return {"completion_id": first["id"], "answer": text, "finish_reason": ENDS.get(str(reason), reason)}


def read_response(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put together the texts of one of OpenAI's responses."""
    first, last = (part.get("response") or part for part in (parts[0], parts[-1]))
    texts = [part["delta"] for part in parts if part.get("type") == "response.output_text.delta"]
    if len(parts) == 1:
        texts = [piece.get("text") or "" for item in first["output"] if item["type"] == "message" for piece in item["content"]]
    return {"completion_id": first["id"], "answer": "".join(texts), "finish_reason": ENDS_OF_RESPONSES.get(last.get("status", ""))}
