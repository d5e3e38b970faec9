"""Feedback as JSONL: all of it to look at, or what can be trained on.

Knows which feedback makes a good conversation. Does not know how either is stored.
"""

from typing import Any

from serve.feedback_store import Row

WHOLE = "stop"  # the engine's reason for an answer that ended by itself


def as_line(row: Row) -> dict[str, Any]:
    """Return all that is known of one feedback; of the conversation only where it was kept."""
    return {name: value for name, value in row.items() if value is not None}


def as_conversation(row: Row) -> dict[str, Any] | None:
    """Return a conversation as `python -m data prepare` reads it, its last turn the better answer or a praised one.

    None where the conversation was not kept, or where nobody said what a good answer would have been.
    """
    is_good = row["rating"] == "up" and row["finish_reason"] == WHOLE
    answer = row["better_answer"] or (row["answer"] if is_good else None)
    if not row["messages"] or not answer:
        return None
    origin = {"completion_id": row["completion_id"], "version": row["version"]}
    return {"messages": [*row["messages"], {"role": "assistant", "content": answer}], **origin}
