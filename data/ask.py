"""Asks an OpenAI-compatible endpoint many questions at once: for answers, for the likelihood of given ones, for the first token.

Knows the official client and key strings. Does not know what the answers are for.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from openai import AsyncOpenAI, BadRequestError, OpenAI, OpenAIError

from cluster.session import operator_key
from configs.errors import RunError
from configs.schema import Environment, ServeConfig
from data.conversations import Conversation, answer_is_right, question
from data.template import NO_LOSS, TokenRow

NUM_AT_ONCE = 32
TIMEOUT_S = 300
KNOWN_TIMEOUT_S = 30.0  # in which every engine knows of a promotion
ASK_AGAIN_S = 0.1
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 (addresses that one listens on, and cannot ask)
Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[], None]


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, the key to show there, and how many questions may be in flight."""

    address: str
    api_key: str | None = None
    num_at_once: int = NUM_AT_ONCE

    def settings(self) -> dict[str, Any]:
        """Return what the official client is made with."""
        return {"base_url": self.address, "api_key": self.api_key or "none", "timeout": TIMEOUT_S}


@dataclass(frozen=True)
class Answer:
    """One answer to a held-out question, and whether it has the key strings."""

    conversation: Conversation
    text: str
    right: bool


@dataclass(frozen=True)
class FirstToken:
    """Which version spoke, and at what time of day its first token came."""

    version: str
    came_s: float


@dataclass(frozen=True)
class Probe:
    """How one request went: how long it took, and whether it failed."""

    duration_s: float
    failed: bool


def own_endpoint(config: ServeConfig, num_at_once: int = NUM_AT_ONCE) -> Endpoint:
    """Return the endpoint that a config serves, with TANDEM_API_KEY or, on the cluster's own machine, the operator's key."""
    host = "127.0.0.1" if config.host in EVERYWHERE else config.host
    secret = Environment().tandem_api_key
    return Endpoint(f"http://{host}:{config.port}/v1", secret.get_secret_value() if secret else operator_key(), num_at_once)


def served_models(endpoint: Endpoint) -> dict[str, dict[str, Any]]:
    """Return the names that may be asked for, each with what the endpoint says of it beyond OpenAI's fields.

    Raises:
        RunError: The endpoint does not answer, or refuses us.
    """
    try:
        return {model.id: model.model_extra or {} for model in OpenAI(**endpoint.settings()).models.list()}
    except OpenAIError as error:
        raise _unanswered(endpoint, error) from error


def ask_all(
    endpoint: Endpoint, model: str, conversations: Sequence[Conversation], max_tokens: int, advance: Advance = lambda: None
) -> list[Answer]:
    """Ask `model` every question greedily, many at once; answers in the order of the questions.

    A question that the endpoint refuses (too long for it, say) is a wrong answer, with the reason as its text.

    Raises:
        RunError: The endpoint does not answer.
    """

    async def ask(client: AsyncOpenAI, conversation: Conversation) -> Answer:
        try:
            text = await _answer(client, model, question(conversation), max_tokens)
        except BadRequestError as refused:
            return Answer(conversation, f"({refused.message})", right=False)
        return Answer(conversation, text, answer_is_right(text, conversation.keys))

    return _each(endpoint, conversations, ask, advance)


def complete_all(
    endpoint: Endpoint, model: str, requests: Sequence[list[dict[str, str]]], max_tokens: int, advance: Advance = lambda: None
) -> list[str]:
    """Ask `model` for the answer to each list of messages; one that is refused is an empty text.

    Raises:
        RunError: The endpoint does not answer.
    """

    async def ask(client: AsyncOpenAI, messages: list[dict[str, str]]) -> str:
        try:
            return await _answer(client, model, messages, max_tokens)
        except BadRequestError:
            return ""

    return _each(endpoint, requests, ask, advance)


def token_logprobs(
    endpoint: Endpoint, model: str, rows: Sequence[TokenRow], num_likeliest: int = 0, advance: Advance = lambda: None
) -> list[list[dict[int, float]] | None]:
    """Return log-probabilities as the engine computes them: for each row's tokens that carry loss, by token id.

    Args:
        endpoint: An endpoint of vLLM's; others do not know `prompt_logprobs`.
        model: A base or a version.
        rows: The tokens, with labels.
        num_likeliest: So many of the likeliest tokens at each place, beside the row's own.
        advance: Called after each row.

    Raises:
        RunError: The endpoint does not answer, or does not say what was asked for. A row that it refuses is None.
    """

    async def ask(client: AsyncOpenAI, row: TokenRow) -> list[dict[int, float]] | None:
        end = max(place for place, label in enumerate(row.labels) if label != NO_LOSS) + 1
        try:
            reply = await client.completions.create(
                model=model,
                prompt=row.input_ids[:end],
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": num_likeliest},
            )
        except BadRequestError:
            return None
        places = (reply.choices[0].model_extra or {}).get("prompt_logprobs")
        if not places:
            why = "it gave no prompt_logprobs; only vLLM's endpoints do"
            raise RunError(f"{endpoint.address} cannot measure perplexity", why, "serve the version with python -m serve CONFIG")
        wanted = [place for place, label in zip(places, row.labels[:end], strict=True) if label != NO_LOSS]
        return [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in wanted]

    return _each(endpoint, rows, ask, advance)


def probe_all(endpoint: Endpoint, model: str, conversations: Sequence[Conversation], max_tokens: int) -> list[Probe]:
    """Ask `model` every question once, without a second try; return how each request went."""

    async def ask(client: AsyncOpenAI, conversation: Conversation) -> Probe:
        started_s = time.monotonic()
        try:
            await _answer(client.with_options(max_retries=0), model, question(conversation), max_tokens)
        except OpenAIError:
            return Probe(time.monotonic() - started_s, failed=True)
        return Probe(time.monotonic() - started_s, failed=False)

    return _each(endpoint, conversations, ask, lambda: None)


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of right answers among the questions that have key strings."""
    judged = [answer for answer in answers if answer.conversation.keys]
    return sum(answer.right for answer in judged) / len(judged) if judged else 0.0


def first_token(endpoint: Endpoint, model: str, conversation: Conversation) -> FirstToken:
    """Ask one question, streamed, and return when the first token came and whose it was.

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
        first, last = None, FirstToken(model, time.time())
        for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = FirstToken(chunk.model, time.time())
            last = FirstToken(chunk.model, time.time())
    except OpenAIError as error:
        raise _unanswered(endpoint, error) from error
    return first or last


def first_token_of(endpoint: Endpoint, model: str, version: str, conversation: Conversation) -> FirstToken:
    """Ask by a chatbot's name until this version answers, and return its first token.

    Raises:
        RunError: The endpoint does not answer, or another version goes on answering.
    """
    deadline = time.monotonic() + KNOWN_TIMEOUT_S
    while (first := first_token(endpoint, model, conversation)).version != version:
        if time.monotonic() > deadline:
            why = f"{model} is still answered by {first.version}, {KNOWN_TIMEOUT_S:.0f} s after the promotion"
            raise RunError(f"{version} is live in the registry, and not on the engine", why, "python -m serve status")
        time.sleep(ASK_AGAIN_S)
    return first


async def _answer(client: AsyncOpenAI, model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    reply = await client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
    )
    return reply.choices[0].message.content or ""


def _each(
    endpoint: Endpoint, items: Sequence[Item], ask: Callable[[AsyncOpenAI, Item], Awaitable[Result]], advance: Advance
) -> list[Result]:
    """Ask about every item, so many at once as the endpoint is given; results in the order of the items."""

    async def ask_each() -> list[Result]:
        places = asyncio.Semaphore(endpoint.num_at_once)
        async with AsyncOpenAI(**endpoint.settings()) as client:

            async def one(item: Item) -> Result:
                async with places:
                    try:
                        return await ask(client, item)
                    finally:
                        advance()

            return await asyncio.gather(*(one(item) for item in items))

    try:
        return asyncio.run(ask_each())
    except OpenAIError as error:
        raise _unanswered(endpoint, error) from error


def _unanswered(endpoint: Endpoint, error: OpenAIError) -> RunError:
    remedy = "python -m serve status"
    if getattr(error, "status_code", None) == 401:
        remedy = "TANDEM_API_KEY in .env, with a key of python -m serve keys create"
    return RunError(f"no answer from {endpoint.address}", str(error), remedy)
