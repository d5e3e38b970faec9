"""Asks an OpenAI-compatible endpoint many questions at once, and counts the right answers.

Knows the official client and key strings. Does not know whose endpoint it is.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, OpenAI

from data.conversations import Conversation, answer_is_right, question

NUM_AT_ONCE = 16
TIMEOUT_S = 300


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out question, and whether it has the key strings."""

    conversation: Conversation
    text: str
    right: bool


def ask_all(
    endpoint: str, model: str, conversations: Sequence[Conversation], max_tokens: int, advance: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Ask `model` every question greedily, many at once; answers in the order of the questions."""

    async def ask_each() -> list[Answer]:
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        async with AsyncOpenAI(base_url=endpoint, api_key="none", timeout=TIMEOUT_S) as client:

            async def ask(conversation: Conversation) -> Answer:
                async with gate:
                    messages = question(conversation)
                    reply = await client.chat.completions.create(
                        model=model,
                        messages=messages,  # type: ignore[arg-type]
                        max_tokens=max_tokens,
                        temperature=0,
                    )
                advance()
                text = reply.choices[0].message.content or ""
                return Answer(conversation, text, answer_is_right(text, conversation.keys))

            return await asyncio.gather(*(ask(conversation) for conversation in conversations))

    return asyncio.run(ask_each())


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of right answers among the questions that have key strings."""
    judged = [answer for answer in answers if answer.conversation.keys]
    return sum(answer.right for answer in judged) / len(judged) if judged else 0.0


def first_token_s(endpoint: str, model: str, conversation: Conversation) -> float:
    """Ask one question, streamed; return the time of day at which the first token came."""
    client = OpenAI(base_url=endpoint, api_key="none", timeout=TIMEOUT_S)
    messages = question(conversation)
    stream: Any = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    arrived_s = 0.0
    for chunk in stream:
        if not arrived_s and chunk.choices and chunk.choices[0].delta.content:
            arrived_s = time.time()
    return arrived_s or time.time()
