"""Turns rows of every known shape into checked conversations, or says what is wrong with them.

Knows the shapes and what makes a row usable. Does not know files, templates or splits.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any

from configs.errors import DataError
from configs.schema import DataConfig
from data.conversations import REGEX_MARK, ROLES, Conversation, Feedback, Message, Split
from data.readers import RawRow, Table, read_tables

NO_SPLIT = "has no split, and data.split is marked"

Fields = dict[str, Any]
Turn = tuple[Any, Any]  # role and content, not checked yet
SPLITS: dict[str, Split] = {"train": "train", "heldout": "heldout", "test": "heldout", "validation": "heldout"}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    reason: str
    raw: str


@dataclass(frozen=True)
class ReadResult:
    """What a source holds."""

    conversations: list[Conversation]
    bad: list[BadRow]


@dataclass(frozen=True)
class Shape:
    """One known shape of rows: the columns that tell it, and how its turns are found."""

    columns: tuple[str, ...]
    turns: Callable[[Fields], list[Turn]]


class RowError(ValueError):
    """The reason why one row cannot be used."""


def read_conversations(config: DataConfig) -> ReadResult:
    """Read and check every row of `config.source`.

    Raises:
        DataError: The source as a whole cannot be read, or its columns are of no known shape.
    """
    conversations, bad = [], []
    for table in _wanted_tables(read_tables(config.source), config):
        shape = _find_shape(table, config.format)
        for row in table.rows:
            try:
                conversations.append(_to_conversation(row, shape, table.split, config))
            except RowError as reason:
                bad.append(BadRow(row.place, str(reason), row.raw))
    return ReadResult(conversations, bad)


def why_unusable(fields: Fields) -> str:
    """Say what is wrong with a row in chat form; nothing where it can be trained on."""
    try:
        _messages(SHAPES["chat"], fields)
    except RowError as reason:
        return str(reason)
    return ""


def _wanted_tables(tables: list[Table], config: DataConfig) -> list[Table]:
    """Leave a dataset's own test split alone, unless its marks are wanted: it may be what others compare by."""
    if config.split == "marked" or not any((table.split or "").startswith("train") for table in tables):
        return tables
    return [table for table in tables if (table.split or "train").startswith("train")]


def _find_shape(table: Table, name: str) -> Shape | None:
    """Return the shape that fits the most telling row; None where no row could even be parsed."""
    seen = [set(row.fields) for row in table.rows if row.fields is not None]
    if not seen:
        return None
    for known, shape in SHAPES.items():
        if name in ("auto", known) and any(columns.issuperset(shape.columns) for columns in seen):
            return shape
    columns = ", ".join(sorted({str(column) for columns in seen[:100] for column in columns})) or "none"
    wanted = {known: shape for known, shape in SHAPES.items() if name in ("auto", known)}
    forms = "; ".join(f"{known}: {', '.join(shape.columns)}" for known, shape in wanted.items())
    remedy = "rename the columns" if name == "auto" else "rename the columns, or set data.format=auto"
    raise DataError(f"{table.name} has no columns of a known shape", f"saw: {columns}\nknown: {forms}", remedy)


def _to_conversation(row: RawRow, shape: Shape | None, table_split: str | None, config: DataConfig) -> Conversation:
    if row.fields is None or shape is None:
        raise RowError(row.reason)
    messages = _messages(shape, row.fields)
    if config.system_prompt and messages[0].role != "system":
        messages = (Message("system", config.system_prompt), *messages)
    feedback = _feedback(row.fields)
    found = Conversation(
        messages,
        group=_group(row.fields),
        keys=_keys(row.fields),
        origin=row.place,
        feedback=feedback,
        synthetic=_synthetic(row.fields),
        # An opinion is of the last answer; the earlier ones may be those that were thumbed down, or the client's own words.
        only_last_answer=feedback is not None or row.fields.get("only_last_answer") is True,
    )
    if config.split == "group" and found.group is None:
        raise RowError("has no group, and data.split is group")
    if config.split == "marked":
        return replace(found, split=_split(row.fields, table_split))
    return found


def _messages(shape: Shape, fields: Fields) -> tuple[Message, ...]:
    messages = tuple(_to_message(number, turn) for number, turn in enumerate(shape.turns(fields), start=1))
    _check_order(messages)
    return messages


def _to_message(number: int, turn: Turn) -> Message:
    role, content = turn
    if role not in ROLES:
        raise RowError(f"message {number} has the unknown role {role!r}; known: {', '.join(ROLES)}")
    text = _to_text(number, content)
    if not text.strip():
        raise RowError(f"message {number} ({role}) has empty content")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"message {number} ({role}) holds half a Unicode character") from None
    return Message(role, text)


def _to_text(number: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RowError(f"message {number} has content that is no text but a {type(content).__name__}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RowError(f"message {number} has a part of kind {kind!r}; only text is known")
        texts.append(part["text"])
    return "".join(texts)


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if not roles:
        raise RowError("has no messages")
    if roles.count("system") > 1:
        raise RowError("has two system messages")
    if "system" in roles[1:]:
        raise RowError("has a system message that is not the first")
    if "assistant" not in roles:
        raise RowError("has no assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowError("has no user turn before the assistant's")
    if roles[-1] != "assistant":
        raise RowError("ends with a user turn; the last must be the assistant's")


def _group(fields: Fields) -> str | None:
    group = fields.get("group")
    return None if group is None or group == "" else str(group)


def _feedback(fields: Fields) -> Feedback | None:
    """Recognise a row that `python -m data feedback` made."""
    names = [name.name for name in dataclass_fields(Feedback)]
    return Feedback(**{name: fields[name] for name in names}) if all(name in fields for name in names) else None


def _synthetic(fields: Fields) -> str | None:
    """Recognise a row that `python -m data synthesize` made."""
    maker = fields.get("synthetic")
    return str(maker) if maker else None


def _split(fields: Fields, table_split: str | None) -> Split:
    value = fields.get("split") or _known_split(table_split or "")
    if not value:
        raise RowError(NO_SPLIT)
    if not isinstance(value, str) or value not in SPLITS:
        raise RowError(f"has the unknown split {value!r}; known: {', '.join(SPLITS)}")
    return SPLITS[value]


def _known_split(name: str) -> str | None:
    """Recognise the name of a dataset's split: `test_sft` is a test split."""
    return next((known for known in SPLITS if name.startswith(known)), None)


def _keys(fields: Fields) -> tuple[str, ...]:
    """Read a list of strings, or in one string (a CSV cell) several set apart by `|`."""
    keys = fields.get("keys") or []
    if isinstance(keys, str):
        keys = keys.split("|")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise RowError("has keys that are no list of texts")
    kept = tuple(key.strip() for key in keys if key.strip())
    for key in kept:
        if key.startswith(REGEX_MARK):
            try:
                re.compile(key.removeprefix(REGEX_MARK))
            except re.error as error:
                raise RowError(f"has a key that is no regular expression: {key} ({error})") from None
    return kept


def _chat_turns(fields: Fields) -> list[Turn]:
    messages = _list(fields, "messages")
    for number, message in enumerate(messages, start=1):
        if message.get("tool_calls") or message.get("function_call"):
            raise RowError(f"message {number} calls tools, which is not supported")
        if message.get("weight", 1) in (0, False):  # would otherwise be trained on all the same
            raise RowError(f"message {number} has weight 0, which is not supported: every answer is trained on")
    return [(message.get("role"), message.get("content")) for message in messages]


def _sharegpt_turns(fields: Fields) -> list[Turn]:
    turns = [(message.get("from"), message.get("value")) for message in _list(fields, "conversations")]
    return [*_system_turn(fields), *((SHAREGPT_ROLES.get(str(role), role), content) for role, content in turns)]


def _alpaca_turns(fields: Fields) -> list[Turn]:
    extra = _strip(fields.get("input"))
    instruction = _strip(fields.get("instruction"))
    return [
        *_system_turn(fields),
        ("user", f"{instruction}\n\n{extra}" if extra else instruction),
        ("assistant", _strip(fields.get("output"))),
    ]


def _pair_turns(asked: str, answered: str) -> Callable[[Fields], list[Turn]]:
    def turns(fields: Fields) -> list[Turn]:
        return [*_system_turn(fields), ("user", _strip(fields.get(asked))), ("assistant", _strip(fields.get(answered)))]

    return turns


def _system_turn(fields: Fields) -> list[Turn]:
    return [("system", fields["system"])] if fields.get("system") else []


def _strip(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _list(fields: Fields, name: str) -> list[Fields]:
    messages = fields.get(name)
    if not messages:
        raise RowError("has no messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError(f"has {name} that are no list of objects")
    return messages


# In the order in which `auto` tries them: a chat dataset often carries a `prompt` column too.
SHAPES = {
    "chat": Shape(("messages",), _chat_turns),
    "sharegpt": Shape(("conversations",), _sharegpt_turns),
    "alpaca": Shape(("instruction", "output"), _alpaca_turns),
    "prompt_completion": Shape(("prompt", "completion"), _pair_turns("prompt", "completion")),
    "question_answer": Shape(("question", "answer"), _pair_turns("question", "answer")),
}
