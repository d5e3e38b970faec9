"""Turns conversations into token ids with the model's own chat template, and says which tokens carry loss.

Knows templates and tokenizers. Does not know files, splits or training.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import DataError, ModelError
from configs.schema import DataConfig
from data.conversations import Conversation, Message, as_dicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class TokenRow:
    """One conversation as the model sees it; `labels` are NO_LOSS except on the assistant's text and its end tokens."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the model learns to say."""
        return sum(label != NO_LOSS for label in self.labels)


class RefusedByTemplateError(DataError):
    """One conversation that the template cannot render; others may do."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model's folder.

    Raises:
        ModelError: There is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer in {folder}", str(error), "name a model whose folder has tokenizer.json") from None
    if not tokenizer.chat_template:
        why = "it is a base model that was not taught to chat, or its tokenizer_config.json is incomplete"
        remedy = "choose its instruct variant, or put a chat_template.jinja there"
        raise ModelError(f"the model in {folder} has no chat template", why, remedy)
    return tokenizer


def tokenize(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    """Render the conversation and mark the assistant's turns for the loss, or its last one alone where the row says so.

    The ids before each answer are the very ids that the server makes of the question.

    Raises:
        RefusedByTemplateError: The template refuses this conversation, or a message holds one of its turn marks.
        DataError: The template renders earlier turns in another way once more follow, so no right mask exists.
    """
    marks = _turn_marks(tokenizer)
    for message in conversation.messages:
        found = marks.search(message.content)
        if found:
            raise _refusal(conversation, f"a message holds {found.group()!r}, with which the model's template marks turns")
    text, answers = _render(conversation, tokenizer, marks)
    pieces = _split_text(text, answers)
    encoded: list[list[int]] = tokenizer([text, *pieces], add_special_tokens=False)["input_ids"]  # the template writes BOS itself
    ids, counts = _join(text, encoded[0], encoded[1:], pieces, tokenizer)
    labels = [NO_LOSS] * len(ids)
    for start, end in zip(counts[0::2], counts[1::2], strict=True):  # pieces go: prompt, answer, prompt, answer, rest
        labels[start:end] = ids[start:end]
    return TokenRow(ids, labels)


def fit(rows: Iterable[TokenRow], config: DataConfig) -> tuple[list[TokenRow | None], int]:
    """Bring rows to `max_length_tokens`; None stands for a row that is dropped, and the count is of rows cut.

    A row that has no loss left after the cut is dropped too.
    """
    fitted: list[TokenRow | None] = []
    num_cut = 0
    for row in rows:
        if len(row.input_ids) <= config.max_length_tokens:
            fitted.append(row)
            continue
        cut = TokenRow(row.input_ids[: config.max_length_tokens], row.labels[: config.max_length_tokens])
        kept = config.too_long == "cut" and cut.num_loss_tokens > 0
        fitted.append(cut if kept else None)
        num_cut += kept
    return fitted, num_cut


def _render(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", marks: re.Pattern[str]) -> tuple[str, list[Span]]:
    """Return the whole text, and the span of each answer that carries loss, with its end token."""
    messages = conversation.messages
    text = _apply(conversation, len(messages), tokenizer)
    answers: list[Span] = []
    first = len(messages) - 1 if conversation.only_last_answer else 0
    for index, message in enumerate(messages):
        if message.role != "assistant" or index < first:
            continue
        prompt = _apply(conversation, index, tokenizer, add_generation_prompt=True)
        with_answer = text if index == len(messages) - 1 else _apply(conversation, index + 1, tokenizer)
        end = _answer_end(with_answer, len(prompt), message.content, marks)
        if not with_answer.startswith(prompt) or end is None or text[:end] != with_answer[:end]:
            raise _unstable(conversation, index)
        answers.append((len(prompt), end))
    return text, answers


def _unstable(conversation: Conversation, index: int) -> DataError:
    what = f"no right loss mask: {conversation.origin or 'a conversation'}, message {index + 1}"
    why = (
        "the model's chat template shows a turn differently once others follow (such as without its thinking), "
        "or opens answers otherwise than it asks for them"
    )
    return DataError(what, why, "use conversations with one answer each, or another base model")


def _apply(conversation: Conversation, num_messages: int, tokenizer: "PreTrainedTokenizerBase", add_generation_prompt: bool = False) -> str:
    import jinja2

    messages = as_dicts(conversation.messages[:num_messages])
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:
        raise _refusal(conversation, f"the model's chat template refuses it: {error}") from None


def _refusal(conversation: Conversation, reason: str) -> RefusedByTemplateError:
    return RefusedByTemplateError(reason, conversation.origin, "mend the conversation, or set data.skip_bad=true")


def _answer_end(text: str, start: int, content: str, marks: re.Pattern[str]) -> int | None:
    """Return where the first turn mark after the answer ends; templates may trim the answer itself."""
    for written in (content, content.strip()):
        at = text.find(written, start)
        if at >= 0:
            end = marks.search(text, at + len(written))
            return end.end() if end else None
    return None


def _split_text(text: str, answers: Sequence[Span]) -> list[str]:
    """Cut the text into prompt, answer, prompt, answer, ..., rest."""
    cuts = [0, *(cut for span in answers for cut in span), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _join(
    text: str, whole: list[int], parts: list[list[int]], pieces: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Return the ids, and how many of them lie before the end of each piece but the last.

    Whole and piecewise ids are mostly equal, which gives the counts. Where they differ, either the tokenizer treats the start of
    a text specially (then each prefix of the text counts its own tokens), or a token reaches over the edge between a prompt and an
    answer that begins with white space. The server makes ids of the prompt alone, so then the pieces are right.
    """
    flat = [token for part in parts for token in part]
    if flat == whole:
        return whole, _sums(parts)[:-1]
    prefixes = ["".join(pieces[: count + 1]) for count in range(len(pieces) - 1)]
    encoded: list[list[int]] = tokenizer(prefixes, add_special_tokens=False)["input_ids"]
    if all(whole[: len(prefix)] == prefix for prefix in encoded):
        return whole, [len(prefix) for prefix in encoded]
    return flat, _sums(parts)[:-1]


def _sums(parts: list[list[int]]) -> list[int]:
    total, sums = 0, []
    for part in parts:
        total += len(part)
        sums.append(total)
    return sums


@lru_cache(maxsize=8)
def _turn_marks(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Match the special tokens that the template itself writes, and those that end a text.

    Other special tokens may stand in a message: SmolLM2 has `<filename>`, which a user may well type.
    """
    probe = Conversation((Message("user", "(question)"), Message("assistant", "(answer)")))
    rendered = _apply(probe, 2, tokenizer) + _apply(probe, 1, tokenizer, add_generation_prompt=True)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = {token for token in special if token in rendered}
    after_answer = rendered[rendered.find("(answer)") :]
    if not any(mark in after_answer for mark in marks):
        why = "an answer ends with no special token, so the model would never learn to stop"
        raise ModelError("the model's chat template has no end-of-turn token", why, "choose another base model")
    marks |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))
