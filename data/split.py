"""Draws held-out conversations, and removes duplicates and leaks.

Knows only the conversations' own content: neither their order nor their place changes the split.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from configs.errors import DataError
from configs.schema import DataConfig
from data.conversations import Conversation, normalise


@dataclass(frozen=True)
class SplitResult:
    """Both sides, and what was left out of them."""

    train: list[Conversation]
    heldout: list[Conversation]
    num_duplicates: int
    num_leaks: int  # left out of train, because the same conversation is held out, or in feedback the same question


def split_conversations(conversations: list[Conversation], config: DataConfig) -> SplitResult:
    """Split by row, group or mark; equal conversations never stand on both sides.

    Feedback is always trained on: a better answer that is held out teaches nothing, and one more row in the draw would move others.

    Raises:
        DataError: One side would be empty.
    """
    kept = _without_duplicates(conversations, config) if config.deduplicate else conversations
    own = [conversation for conversation in kept if not conversation.feedback]
    drawn = _draw(own, config)
    heldout = [replace(conversation, split="heldout") for conversation in own if _unit(conversation, config) in drawn]
    taught = (conversation for conversation in kept if conversation.feedback or _unit(conversation, config) not in drawn)
    train = [replace(conversation, split="train") for conversation in taught]
    heldout_keys = {conversation_key(conversation) for conversation in heldout}
    asked = {_question_key(conversation) for conversation in heldout}
    clean = [
        conversation
        for conversation in train
        if conversation_key(conversation) not in heldout_keys and not (conversation.feedback and _question_key(conversation) in asked)
    ]
    if kept and not (clean and heldout):
        if not own:
            raise DataError("no conversation is held out", "all are feedback, which is for training alone", "add conversations of your own")
        raise _one_sided(config, "held out" if clean else "to train on", len(train) - len(clean))
    return SplitResult(clean, heldout, len(conversations) - len(kept), len(train) - len(clean))


def conversation_key(conversation: Conversation) -> str:
    """Return a digest that is equal for conversations equal but for case and white space."""
    return _digest((message.role, normalise(message.content)) for message in conversation.messages)


def turns_key(conversation: Conversation) -> str:
    """Return a digest of the turns without the system message, so that a new system prompt changes no split."""
    return _digest((message.role, normalise(message.content)) for message in conversation.messages if message.role != "system")


def _question_key(conversation: Conversation) -> str:
    """Return a digest of what was asked: people ask the held-out questions too, and praise the answers."""
    return turns_key(replace(conversation, messages=conversation.messages[:-1]))


def _digest(turns: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\x1e".join(f"{role}\x1f{content}" for role, content in turns).encode()).hexdigest()


def _unit(conversation: Conversation, config: DataConfig) -> str | None:
    """Return what is held out whole: all of one mark, of one group, or of equal turns."""
    if config.split == "marked":
        return conversation.split
    return conversation.group if config.split == "group" else turns_key(conversation)


def _without_duplicates(conversations: list[Conversation], config: DataConfig) -> list[Conversation]:
    """Keep the first of equal conversations; marked ones are compared within their own split, the rest being leaks."""
    first: dict[tuple[str, str | None], Conversation] = {}
    for conversation in conversations:
        mark = conversation.split if config.split == "marked" else None
        first.setdefault((conversation_key(conversation), mark), conversation)
    return list(first.values())


def _draw(conversations: list[Conversation], config: DataConfig) -> set[str | None]:
    """Choose the exact share of units, at least one and not all, by the order of their seeded digests."""
    if config.split == "marked":
        return {"heldout"}
    units = {_unit(conversation, config) for conversation in conversations}
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{config.split_seed}:{unit}".encode()).hexdigest())
    num_heldout = max(1, min(len(order) - 1, round(config.heldout_share * len(order))))
    return set(order[:num_heldout]) if len(order) > 1 else set()


def _one_sided(config: DataConfig, side: str, num_leaks: int) -> DataError:
    if num_leaks:
        return DataError("nothing left to train on", f"all {num_leaks} conversations are held out too", "add conversations to train on")
    if config.split == "marked":
        return DataError(f"no conversation is marked as {side}", "data.split is marked", "set `split` of some rows, or data.split=row")
    if config.split == "group":
        return DataError(f"no conversation is {side}", "all are of one group, held out whole or not", "data.split=row, or add groups")
    return DataError(f"no conversation is {side}", "all are equal, and a split needs at least two", "add conversations")
