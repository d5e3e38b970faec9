"""Opinions on answers, as people would have left them in the database."""

import time
from typing import Any

from data.feedback_store import FeedbackStore, feedback_url

ROW: dict[str, Any] = {"rating": "up", "finish_reason": "stop", "answer": "Gut.", "better_answer": None, "comment": None}
ROW |= {"completion_id": "x", "version": "bot:2", "key_name": "ada", "created_s": 5.0}


def told(completion_id: str, question: str, answer: str = "Run it.", **said: Any) -> dict[str, Any]:
    """One answer, and what was said of it just now; with `days` so many days ago, with `kept=False` without its conversation."""
    days, kept = said.pop("days", 0), said.pop("kept", True)
    messages = [{"role": "user", "content": question}]
    row = {**ROW, "completion_id": completion_id, "created_s": time.time() - days * 86400, "messages": messages, "answer": answer, **said}
    return row if kept else {**row, "messages": None}


async def fill(*rows: dict[str, Any]) -> None:
    store = FeedbackStore(feedback_url())
    for row in rows:
        signed = {name: row[name] for name in ("completion_id", "version", "key_name", "created_s")}
        if row["messages"]:
            store.keep(lambda row=row, signed=signed: {**signed, **{name: row[name] for name in ("messages", "answer", "finish_reason")}})
        await store.save({**signed, **{name: row[name] for name in ("rating", "comment", "better_answer")}})
    store.close()
