"""Asks an OpenAI-compatible endpoint many questions at once, and counts the right answers.

Knows the official client and key strings. Does not know whose endpoint it is.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI, OpenAIError

from configs.errors import RunError
from data.conversations import Conversation, answer_is_right, question

NUM_AT_ONCE = 32
TIMEOUT_S = 300


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, and the key to show there."""

    address: str
    api_key: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return what the official client is made with."""
        return {"base_url": self.address, "api_key": self.api_key or "none", "timeout": TIMEOUT_S}


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out question, and whether it has the key strings."""

    conversation: Conversation
    text: str
    right: bool


def ask_all(
    endpoint: Endpoint, model: str, conversations: Sequence[Conversation], max_tokens: int, advance: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Ask `model` every question greedily, many at once; answers in the order of the questions.

    A question that the endpoint refuses (too long for it, say) is a wrong answer, with the reason as its text.

    Raises:
        RunError: The endpoint does not answer.
    """

    async def ask_each() -> list[Answer]:
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        async with AsyncOpenAI(**endpoint.settings()) as client:

            async def ask(conversation: Conversation) -> Answer:
                async with gate:
                    try:
                        reply = await client.chat.completions.create(
                            model=model,
                            messages=question(conversation),  # type: ignore[arg-type]
                            max_tokens=max_tokens,
                            temperature=0,
                        )
                    except BadRequestError as refused:
                        return Answer(conversation, f"({refused.message})", right=False)
                    finally:
                        advance()
                text = reply.choices[0].message.content or ""
                return Answer(conversation, text, answer_is_right(text, conversation.keys))

            return await asyncio.gather(*(ask(conversation) for conversation in conversations))

    try:
        return asyncio.run(ask_each())
    except OpenAIError as error:
        raise _unanswered(endpoint, error) from error


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of right answers among the questions that have key strings."""
    judged = [answer for answer in answers if answer.conversation.keys]
    return sum(answer.right for answer in judged) / len(judged) if judged else 0.0


def first_token_s(endpoint: Endpoint, model: str, conversation: Conversation) -> float:
    """Ask one question, streamed; return the time of day at which the first token came.

    Raises:
        RunError: The endpoint does not answer.
    """
    try:
        stream: Any = OpenAI(**endpoint.settings()).chat.completions.create(
            model=model,
            messages=question(conversation),  # type: ignore[arg-type]
            max_tokens=16,
            temperature=0,
            stream=True,
        )
        arrived_s = 0.0
        for chunk in stream:
            if not arrived_s and chunk.choices and chunk.choices[0].delta.content:
                arrived_s = time.time()
    except OpenAIError as error:
        raise _unanswered(endpoint, error) from error
    return arrived_s or time.time()


def _unanswered(endpoint: Endpoint, error: OpenAIError) -> RunError:
    return RunError(f"no answer from {endpoint.address}", str(error), "python -m serve status")
