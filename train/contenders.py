"""Asks a contender, a version or the base, everything that an evaluation asks, and counts.

Knows questions, answers and likelihoods. Does not know which contender is to win.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import ChatbotConfig
from data.ask import Answer, Endpoint, ask_all, token_logprobs
from data.conversations import Conversation, Message, normalise
from data.template import TokenRow, tokenize
from train.judge import Verdict, judge
from train.scores import ACCURACY, EXACT, FORGOTTEN, GENERAL, PERPLEXITY, Interval, Sample, measure, measure_all

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """Who is asked: a version, with the system message that it was trained with, or the base, with none."""

    name: str
    system_prompt: str | None = None


@dataclass(frozen=True)
class Measured:
    """What one contender said, and the metrics that follow from it; `answers` is empty for one that is asked general questions alone."""

    contender: Contender
    answers: list[Answer]
    general: list[Answer]
    samples: dict[str, Sample]
    scores: dict[str, Interval]


def as_asked(conversation: Conversation, own_prompt: str | None, prompt: str | None) -> Conversation:
    """Return a conversation as somebody would have it with a version: its system message is `prompt`, unless the row brings its own.

    `own_prompt` is the one that the data's preparation put in front of every row without one.
    """
    turns = conversation.messages
    if turns[0].role == "system":
        if turns[0].content != own_prompt:
            return conversation
        turns = turns[1:]
    return replace(conversation, messages=(Message("system", prompt), *turns) if prompt else turns)


def spread(items: Sequence[Any], most: int | None) -> list[Any]:
    """Return at most so many of the items, evenly spread over all."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


class Desk:
    """Asks the contenders, one after the other."""

    def __init__(self, config: ChatbotConfig, endpoint: Endpoint, tokenizer: Any, say: Say) -> None:
        self.config, self.endpoint, self.tokenizer, self.say = config, endpoint, tokenizer, say

    def ask(self, contender: Contender, heldout: list[Conversation], general: list[Conversation]) -> Measured:
        """Ask held-out and general questions, and how likely the held-out answers are."""
        max_tokens = self.config.evaluation.max_answer_tokens
        own_prompt = self.config.data.system_prompt
        asked = [as_asked(conversation, own_prompt, contender.system_prompt) for conversation in heldout]
        plain = [as_asked(conversation, None, contender.system_prompt) for conversation in general]
        self.say(f"asking {contender.name}: {len(asked)} held-out questions, {len(plain)} general ones")
        answers = ask_all(self.endpoint, contender.name, [*asked, *plain], max_tokens)
        of_heldout, of_general = answers[: len(asked)], answers[len(asked) :]
        judged = [answer for answer in of_heldout if answer.conversation.keys]
        samples = [
            self._perplexity(contender, asked),
            Sample.of_shares(ACCURACY, [answer.right for answer in judged], groups_of(judged)),
            Sample.of_shares(EXACT, [is_exact(answer) for answer in of_heldout], groups_of(of_heldout)),
            Sample.of_shares(GENERAL, [answer.right for answer in of_general], groups_of(of_general)),
        ]
        by_name = {sample.metric: sample for sample in samples}
        return Measured(contender, of_heldout, of_general, by_name, measure_all(by_name))

    def judge(self, own: Measured, other: Measured) -> list[Verdict]:
        """Let the judge compare, where there is one."""
        settings = self.config.evaluation.judge
        if not settings.address:
            return []
        ours, theirs = spread(own.answers, settings.num_questions), spread(other.answers, settings.num_questions)
        self.say(f"{settings.model} judges {len(ours)} pairs of answers, in both orders")
        return judge(settings, ours, theirs)

    def _perplexity(self, contender: Contender, asked: list[Conversation]) -> Sample:
        """Ask how likely the engine takes the held-out answers to be; only the assistant's tokens count.

        A row that the engine refuses, for it is too long, counts nothing.
        """
        rows = [tokenize(conversation, self.tokenizer) for conversation in asked]
        found = token_logprobs(self.endpoint, contender.name, rows)
        if not any(found):
            return Sample(PERPLEXITY, (), ())
        asked_and_found = list(zip(found, rows, strict=True))
        tops = tuple(surprise(places, row) if places else 0.0 for places, row in asked_and_found)
        bottoms = tuple(float(row.num_loss_tokens) if places else 0.0 for places, row in asked_and_found)
        return Sample(PERPLEXITY, tops, bottoms, tuple(conversation.group for conversation in asked))


def groups_of(answers: Sequence[Answer]) -> list[str | None]:
    """Return the group of each answer's conversation."""
    return [answer.conversation.group for answer in answers]


def surprise(places: list[dict[int, float]], row: TokenRow) -> float:
    """Return the sum of negative log-probabilities of a row's own tokens that carry loss."""
    tokens = [label for label in row.labels if label >= 0]
    return -sum(place[token] for place, token in zip(places, tokens, strict=True))


def is_exact(answer: Answer) -> bool:
    """Whether an answer is the held-out one, whatever the case and white space."""
    return normalise(answer.text) == normalise(answer.conversation.messages[-1].content)


def with_sample(measured: Measured, sample: Sample) -> Measured:
    """Add a metric."""
    samples, scores = {**measured.samples, sample.metric: sample}, {**measured.scores, sample.metric: measure(sample)}
    return replace(measured, samples=samples, scores=scores)


def with_forgotten(measured: Measured, base: Measured) -> Measured:
    """Add the share of the general questions that the base answers right and this version does not."""
    lost = [before.right and not now.right for before, now in zip(base.general, measured.general, strict=True)]
    return with_sample(measured, Sample.of_shares(FORGOTTEN, lost, groups_of(measured.general)))
