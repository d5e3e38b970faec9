"""What people say of answers: `POST /v1/feedback`, and the conversations that it is about, where the operator keeps them.

Knows the request's fields and who may speak of which answer. Does not know the database.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from configs.schema import FeedbackConfig
from data.feedback_store import MAX_ID_LETTERS, FeedbackStore, Row, StoreError, feedback_url
from serve.completion_ids import CompletionIds
from serve.keys import Key, is_operator
from serve.protocols import Protocol
from serve.refusal import UNAVAILABLE, RefusedError, Send, send_json
from serve.transcript import Transcript

RETRY_S = 5
# Some databases have no place for a NUL.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", strip_whitespace=True)]

log = logging.getLogger("tandem.api")


class Opinion(BaseModel):
    """The body of a request: one for each answer, the last one holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    completion_id: Annotated[str, StringConstraints(max_length=MAX_ID_LETTERS)]
    rating: Literal["up", "down"]
    comment: Text | None = None
    better_answer: Text | None = None


class FeedbackDesk:
    """What the front hands feedback to; it also gives the ids by which people speak of answers."""

    def __init__(self, config: FeedbackConfig, store: FeedbackStore, ids: CompletionIds) -> None:
        self.config, self.store, self.ids = config, store, ids

    @classmethod
    def of_home(cls, config: FeedbackConfig) -> "FeedbackDesk":
        """Return the desk of this home folder."""
        return cls(config, FeedbackStore(feedback_url()), CompletionIds.of_home())

    def told(self) -> dict[str, Any]:
        """Return what the chat page tells people before they write."""
        return {"consent": self.config.consent if self.config.keep_conversations else None, "max_letters": self.config.max_letters}

    async def take(self, request: dict[str, Any], key: Key | None, send: Send) -> None:
        """Store an opinion and say so.

        Raises:
            RefusedError: It has mistakes, is about none of this key's answers, or cannot be stored.
        """
        opinion = _read(request, self.config.max_letters)
        version = self.ids.version_of(opinion.completion_id, key)
        if version is None:
            message = f"no answer to this key has the id {opinion.completion_id[:100]}"
            raise RefusedError(404, message, kind="not_found_error", param="completion_id")
        said = {"rating": opinion.rating, "comment": opinion.comment or None, "better_answer": opinion.better_answer or None}
        try:
            await self.store.save({**_signed(opinion.completion_id, version, key), **said})
        except StoreError as error:
            log.error("feedback cannot be stored: %s", error)
            raise RefusedError(503, "feedback cannot be stored now", kind=UNAVAILABLE).after(RETRY_S) from None
        await send_json(send, 200, {"object": "feedback", "id": opinion.completion_id, "model": version, **said})

    @contextmanager
    def listening(self, send: Send, request: dict[str, Any], key: Key | None, protocol: Protocol) -> Iterator[Send]:
        """Give a `send` for a request's answer; where conversations are kept, the chat is handed to the store at the end."""
        version = request["model"]
        if not self.config.keep_conversations or not protocol.reader or not protocol.turns_of(request) or is_operator(key):
            yield send
            return
        transcript = Transcript(protocol.chat_of(request), protocol.reader)

        def make_row() -> Row | None:
            heard = transcript.row()
            return heard and {**_signed(heard["completion_id"], version, key), **heard}

        try:
            yield transcript.follow(send)
        finally:
            self.store.keep(make_row, transcript.num_bytes)


def _signed(completion_id: str, version: str, key: Key | None) -> Row:
    return {"completion_id": completion_id, "version": version, "key_name": key.name if key else None, "created_s": time.time()}


def _read(request: dict[str, Any], max_letters: int) -> Opinion:
    try:
        opinion = Opinion.model_validate(request)
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, mistake["loc"]))
        raise RefusedError(400, f"{field}: {mistake['msg'].lower()}", param=field) from None
    for field in ("comment", "better_answer"):
        if len(getattr(opinion, field) or "") > max_letters:
            raise RefusedError(400, f"{field} may have {max_letters} letters at most (serve.feedback.max_letters)", param=field)
    return opinion
