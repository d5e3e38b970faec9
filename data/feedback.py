"""Feedback as JSONL: all of it to look at, or what can be trained on.

Knows which feedback makes a good conversation. Does not know how either is stored.
"""

from typing import Any

from data.feedback_store import Row

TOOL_FIELDS = ("tool_calls", "function_call")
PLAIN_ROLES = ("system", "user", "assistant")
WHOLE = "stop"  # the engine's reason for an answer that ended by itself


def as_line(row: Row) -> dict[str, Any]:
    """Return all that is known of one feedback; of the conversation only where it was kept."""
    return {name: value for name, value in row.items() if value is not None}


def as_conversation(row: Row) -> dict[str, Any] | None:
    """Return a conversation as `python -m data prepare` reads it, its last turn the better answer or a praised one.

    None where the conversation was not kept, where nobody said what a good answer would have been, or where it has more than
    texts: tools, pictures, a system message that is not the first.
    """
    is_good = row["rating"] == "up" and row["finish_reason"] == WHOLE
    answer = row["better_answer"] or (row["answer"] if is_good else None)
    messages = _plain(row["messages"])
    if not messages or not answer or not answer.strip():
        return None
    origin = {"completion_id": row["completion_id"], "version": row["version"]}
    return {"messages": [*messages, {"role": "assistant", "content": answer}], **origin}


def _plain(messages: Any) -> list[dict[str, str]] | None:
    """Return roles and texts alone, as `data` knows them; None where that would leave something out."""
    turns = [_plain_turn(message) for message in messages] if isinstance(messages, list) else []
    plain = [turn for turn in turns if turn]
    roles = [turn["role"] for turn in plain]
    if len(plain) < len(turns) or "system" in roles[1:] or "user" not in roles:
        return None
    return plain if "assistant" not in roles or roles.index("user") < roles.index("assistant") else None


def _plain_turn(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict) or any(message.get(field) for field in TOOL_FIELDS):
        return None
    role = "system" if message.get("role") == "developer" else message.get("role")
    parts = message.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts if isinstance(parts, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)]
    text = "".join(texts)
    if role not in PLAIN_ROLES or len(texts) < len(parts) or not text.strip():
        return None
    return {"role": role, "content": text}
