"""What a conversation is, how it is kept on disk, and when an answer counts as right.

Knows messages. Does not know where they came from, nor any template or model.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from configs.errors import DataError

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "heldout"]
REGEX_MARK = "re:"
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Feedback:
    """The opinion on an answer that a conversation was made from."""

    completion_id: str
    version: str
    key_name: str | None
    created_s: float


@dataclass(frozen=True)
class Conversation:
    """One checked conversation; its last turn is the assistant's."""

    messages: tuple[Message, ...]
    group: str | None = None  # conversations of one group are never spread over both splits
    split: Split | None = None
    keys: tuple[str, ...] = ()  # what a right answer contains, or with `re:` in front what it matches
    origin: str = ""  # file:line
    feedback: Feedback | None = None
    synthetic: str | None = None  # what worded it, if no person did
    only_last_answer: bool = False  # nobody vouches for the earlier ones, so they carry no loss

    def to_row(self) -> dict[str, Any]:
        """Return the row of Tandem's own JSONL form."""
        return {
            "messages": as_dicts(self.messages),
            "group": self.group,
            "split": self.split,
            "keys": list(self.keys),
            "origin": self.origin,
            "feedback": self.feedback and asdict(self.feedback),
            "synthetic": self.synthetic,
            **({"only_last_answer": True} if self.only_last_answer else {}),
        }

    def content(self) -> dict[str, Any]:
        """Return the row without where it came from."""
        return {name: value for name, value in self.to_row().items() if name not in ("feedback", "synthetic")} | {"origin": ""}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Conversation":
        """Read a row that `to_row` made."""
        messages = tuple(Message(message["role"], message["content"]) for message in row["messages"])
        feedback = Feedback(**row["feedback"]) if row.get("feedback") else None
        told = (row["group"], row["split"], tuple(row["keys"]), row["origin"], feedback, row.get("synthetic"))
        return cls(messages, *told, row.get("only_last_answer", False))


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages in OpenAI's form."""
    return [{"role": message.role, "content": message.content} for message in messages]


def question(conversation: Conversation) -> list[dict[str, str]]:
    """Return the messages before the last answer, for a request to a chat endpoint."""
    return as_dicts(conversation.messages[:-1])


def read_prepared(file: Path) -> list[Conversation]:
    """Read conversations that `prepare` wrote.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [Conversation.from_row(json.loads(line)) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot read prepared conversations from {file}", why, "python -m data prepare CONFIG") from None


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Write one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answer_is_right(answer: str, keys: Sequence[str]) -> bool:
    """Tell whether `answer` contains every key, whatever the case and white space; without keys every answer does.

    A key that begins with `re:` is a regular expression.
    """
    folded = normalise(answer)
    return all(_has(answer, folded, key) for key in keys)


def _has(answer: str, folded: str, key: str) -> bool:
    if key.startswith(REGEX_MARK):
        return re.search(key.removeprefix(REGEX_MARK), answer, re.IGNORECASE) is not None
    return normalise(key) in folded


def normalise(text: str) -> str:
    """Fold case, white space and Unicode spellings, for comparing texts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
