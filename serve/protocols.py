"""The routes that make the engine answer, and how each says what the front must know: one row a route, and no `if` elsewhere.

Knows the shapes of OpenAI's and Anthropic's requests, answers and errors, as vLLM speaks them. Does not know keys or the engine.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.refusal import RefusedError, Scope
from serve.transcript import Reader, read_chat, read_message, read_response

CONVERSATION_HEADER = b"x-tandem-conversation"
ANTHROPIC_KEY_HEADER = b"x-api-key"
OWN_WORD = ("system", "developer")
TEXTS = ("input_text", "output_text")


class Usage(NamedTuple):
    """The tokens of one request."""

    num_prompt_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True)
class Protocol:
    """How one route writes what the front reads and adds."""

    turns: str | None
    """Field of the conversation; None where there is none."""
    system: str | None
    """Field of the system prompt; None where it is the first of the turns."""
    usage_mark: bytes
    """What the event of a stream has in it that states the usage of all."""
    token_mark: bytes
    """What each event of a stream has in it that brings a piece of the answer."""
    usage_is_asked_for: bool = False
    """Whether a stream states its usage only where `stream_options` asks for it, in an event that says nothing else."""
    has_anthropics_errors: bool = False
    names_events: bool = False
    """Whether the events of a stream have names."""
    id_prefix: str | None = None
    """What an answer's id begins with, where vLLM takes it from the request's body; None where it takes it from a header."""
    kinds_of_turns: tuple[str, ...] | None = None
    """Types that a turn may have, where others make vLLM stumble; all, if None."""
    reader: Reader | None = None
    """What puts an answer together, for conversations that are kept where the operator wants it; none of this route are, if None."""

    def turns_of(self, request: dict[str, Any]) -> list[Any]:
        """Return the conversation so far; empty where there is none, or of another shape."""
        turns = request.get(self.turns) if self.turns else None
        if isinstance(turns, str) and turns:  # of responses: the same as one message of a user
            return [{"role": "user", "content": turns}]
        return turns if isinstance(turns, list) else []

    def chat_of(self, request: dict[str, Any]) -> list[Any]:
        """Return the conversation as chats are written: a system prompt is its first turn, and a text is a text."""
        system = request.get(self.system) if self.system else None
        turns = [{"role": "system", "content": system}] if system else []
        return [_with_plain_texts(turn) for turn in (*turns, *self.turns_of(request))]

    def conversation(self, scope: Scope, request: dict[str, Any], owner: str) -> str:
        """Return what stays the same over a conversation: what the client says it is, or its first user message; and always its owner.

        Completions have no conversation: without a word from the client, all of an owner's are one.
        """
        said = dict(scope["headers"]).get(CONVERSATION_HEADER, b"").decode("latin-1") or _user(request)
        if not said:
            first = next((turn for turn in self.turns_of(request) if isinstance(turn, dict) and turn.get("role") == "user"), {})
            said = json.dumps(_text(first.get("content")))
        return f"{owner}\n{said}"

    def add_system_prompt(self, request: dict[str, Any], prompt: str | None) -> None:
        """Begin a conversation as the version was trained to: with its own system message, unless the request brings one."""
        turns = self.turns_of(request)
        if not prompt or not turns or (self.system and request.get(self.system)):
            return
        if isinstance(turns[0], dict) and turns[0].get("role") in OWN_WORD:
            return
        if self.system:
            request[self.system] = prompt
        elif self.turns and isinstance(request[self.turns], list):
            request[self.turns] = [{"role": "system", "content": prompt}, *turns]

    def put_id(self, request: dict[str, Any], completion_id: str) -> None:
        """Give the answer its id, where that is done in the body."""
        if self.id_prefix:
            request["request_id"] = self.id_prefix + completion_id

    def parts(self, request: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Return the parts that the turns' contents are made of, where they are not plain text; those within tools' results too."""
        waiting = [*self.turns_of(request), {"content": request.get(self.system)} if self.system else None]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                yield part
                waiting += [inner for field in ("content", "output") if isinstance(part.get(field), list) for inner in part[field]]

    def error_body(self, refusal: RefusedError) -> dict[str, Any]:
        """Return an error in the shape that the route's own client understands."""
        if not self.has_anthropics_errors:
            return refusal.body()
        return {"type": "error", "error": {"type": ANTHROPIC_ERRORS.get(refusal.status, "api_error"), "message": refusal.message}}

    def error_event(self, refusal: RefusedError) -> bytes:
        """Return the event by which the route's own client learns that a stream under way has failed."""
        name = "event: error\n" if self.names_events else ""
        body = {"type": "error", **self.error_body(refusal)} if self.names_events else self.error_body(refusal)
        return f"{name}data: {json.dumps(body)}\n\n".encode()

    def usage(self, answer: Any) -> Usage | None:
        """Return the tokens of prompt and answer that an answer states, or the event of a stream that does."""
        try:
            stated = (answer.get("response") or answer)["usage"]
            num_prompt, num_answer = (sum(int(stated.get(kind) or 0) for kind in kinds) for kinds in (PROMPT_USAGE, ANSWER_USAGE))
            return Usage(num_prompt, int(stated["total_tokens"]) - num_prompt if "total_tokens" in stated else num_answer)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


# What OpenAI's chats, OpenAI's responses and Anthropic's messages call them; an answer has those of one of the three.
PROMPT_USAGE = ("prompt_tokens", "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
ANSWER_USAGE = ("completion_tokens", "output_tokens")
ANTHROPIC_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_CHAT = Protocol("messages", None, b'"choices":[]', b"data: {", usage_is_asked_for=True, reader=read_chat)
_COMPLETIONS = Protocol(None, None, b'"choices":[]', b"data: {", usage_is_asked_for=True)
_KINDS = ("message", "function_call", "function_call_output", "reasoning")
_RESPONSES = Protocol(
    "input",
    "instructions",
    b"event: response.completed\n",
    b".delta\n",
    names_events=True,
    id_prefix="resp_",
    kinds_of_turns=_KINDS,
    reader=read_response,
)
_MESSAGES = Protocol(
    "messages",
    "system",
    b"event: message_delta\n",
    b"event: content_block_delta\n",
    names_events=True,
    has_anthropics_errors=True,
    reader=read_message,
)
PROTOCOLS = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETIONS,
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
}


def error_body(path: str, refusal: RefusedError) -> dict[str, Any]:
    """Return an error in the shape that a route's client understands; OpenAI's where no route is meant."""
    return PROTOCOLS.get(path, _CHAT).error_body(refusal)


def with_bearer(scope: Scope) -> Scope:
    """Show a key as OpenAI's clients do, where Anthropic's has shown it in a header of its own."""
    headers = dict(scope["headers"])
    if ANTHROPIC_KEY_HEADER not in headers or b"authorization" in headers:
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + headers[ANTHROPIC_KEY_HEADER])]}


def _user(request: dict[str, Any]) -> str | None:
    """Return whom the client says that it asks for: OpenAI's field, or Anthropic's."""
    metadata = request.get("metadata")
    said = request.get("user") or (metadata.get("user_id") if isinstance(metadata, dict) else None)
    return said if isinstance(said, str) else None


def _with_plain_texts(turn: Any) -> Any:
    """Name the texts of a turn as chats do, where responses name who wrote them."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    parts = [{**part, "type": "text"} if isinstance(part, dict) and part.get("type") in TEXTS else part for part in turn["content"]]
    return {**turn, "content": parts}


def _text(content: Any) -> Any:
    """Return a content's text, in whichever of its shapes it comes: a client may turn the one into the other as a conversation grows."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
