"""From stored conversations with thumbs to rows that a person reviews, and to those that training may read.

Knows which feedback makes a good conversation, and where rows wait. Does not know how feedback is stored or scrubbed.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.home import OWNER_ONLY, home_folder, write_text
from configs.errors import DataError
from data.conversations import to_jsonl
from data.feedback_store import Row
from data.scrub import Scrubber

TOOL_FIELDS = ("tool_calls", "function_call")
PLAIN_ROLES = ("system", "user", "assistant")
WHOLE = "stop"  # the engine's reason for an answer that ended by itself
PENDING, ACCEPTED, DECLINED, REJECTED = "pending.jsonl", "accepted.jsonl", "declined.jsonl", "rejected.jsonl"
REPORT = "report.json"
BETTER, PRAISED, BAD = "better answer", "praised", "rejected"
Fields = dict[str, Any]


@dataclass
class Gathered:
    """What one look at the feedback found."""

    pending: list[Fields] = field(default_factory=list)
    rejected: list[Fields] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_decided: int = 0

    def scrubbed(self) -> dict[str, dict[str, int]]:
        """Return for each kind of personal data how much was taken out, and of how many rows."""
        counts: dict[str, dict[str, int]] = {}
        for row in (*self.pending, *self.rejected):
            for kind, number in row["scrubbed"].items():
                found = counts.setdefault(kind, {"found": 0, "rows": 0})
                found["found"] += number
                found["rows"] += 1
        return dict(sorted(counts.items()))


class Review:
    """The rows of one chatbot that wait for a person, and those that a person decided on."""

    def __init__(self, chatbot: str) -> None:
        self.folder = home_folder() / "feedback" / chatbot

    def read(self, name: str) -> list[Fields]:
        """Return the rows of one of the four files."""
        return read_rows(self.folder / name)

    def write(self, name: str, rows: Iterable[Fields]) -> None:
        """Replace one of the four files."""
        write_text(self.folder / name, to_jsonl(rows), OWNER_ONLY)

    def gather(self, rows: list[Row], since_s: float, scrubber: Callable[[], Scrubber]) -> Gathered:
        """Sort feedback into rows to review and rejected ones, scrubbed, and write both with a report.

        What waits already stays as it is, so that a person's own corrections in the file are kept; what was decided on does not come again.

        Args:
            rows: All feedback on this chatbot.
            since_s: Feedback from before this moment is left alone.
            scrubber: Makes the scrubber, if there is anything to scrub.
        """
        decided = {_identity(row) for name in (ACCEPTED, DECLINED) for row in self.read(name)}
        newest = {row["completion_id"]: row["created_s"] for row in rows}
        waiting = {row["completion_id"]: row for row in self.read(PENDING) if newest.get(row["completion_id"]) == row["created_s"]}
        gathered, tool = Gathered(), None
        for row in rows:
            if row["created_s"] < since_s:
                continue
            if _identity(row) in decided:
                gathered.num_decided += 1
                continue
            made, reason = as_conversation(row)
            if made is None:
                gathered.left_out[reason] += 1
                continue
            if row["completion_id"] in waiting:
                continue
            tool = tool or scrubber()
            scrubbed = scrub_row(made, tool)
            if made["why"] == BAD:
                gathered.rejected.append(scrubbed)
            else:
                waiting[row["completion_id"]] = scrubbed
        gathered.pending = list(waiting.values())
        self.write(PENDING, gathered.pending)
        self.write(REJECTED, gathered.rejected)
        self._report(gathered, since_s)
        return gathered

    def decide(self, accepted: list[Fields], declined: list[Fields]) -> None:
        """Take rows out of the review: the accepted ones are trained on from now on, the declined ones never."""
        gone = {_identity(row) for row in (*accepted, *declined)}
        if accepted:
            # A row that was accepted before and rated anew takes its own place.
            renewed = {row["completion_id"] for row in accepted}
            self.write(ACCEPTED, [*(row for row in self.read(ACCEPTED) if row["completion_id"] not in renewed), *accepted])
        if declined:
            known = [{name: row[name] for name in ("completion_id", "created_s", "key_name")} for row in declined]
            self.write(DECLINED, [*self.read(DECLINED), *known])
        self.write(PENDING, [row for row in self.read(PENDING) if _identity(row) not in gone])

    def _report(self, gathered: Gathered, since_s: float) -> None:
        """Write counts alone: no value that was taken out is kept anywhere."""
        rows = [*gathered.pending, *gathered.rejected]
        report = {
            "made_s": time.time(),
            "since_s": since_s,
            "num_pending": len(gathered.pending),
            "num_rejected": len(gathered.rejected),
            "left_out": dict(gathered.left_out),
            "scrubbed": gathered.scrubbed(),
            "scrubbed_by_row": {row["completion_id"]: row["scrubbed"] for row in rows if row["scrubbed"]},
        }
        write_text(self.folder / REPORT, json.dumps(report, indent=2) + "\n", OWNER_ONLY)


def accepted_file(chatbot: str) -> Path:
    """Return where the rows lie that a person accepted for this chatbot."""
    return home_folder() / "feedback" / chatbot / ACCEPTED


def read_rows(file: Path) -> list[Fields]:
    """Read a file of rows; none where it is not there.

    Raises:
        DataError: It was damaged, perhaps by hand.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{file}:{number} is not JSON", str(error), "mend the line or remove it") from None
    return rows


def as_conversation(row: Row) -> tuple[Fields | None, str]:
    """Return a conversation in chat form, and where it came from; its last turn is the better answer, or the one that was rated.

    None, with the reason, where there is nothing to train on or to review.
    """
    if row["messages"] is None:
        return None, "the conversation was not kept (serve.feedback.keep_conversations)"
    messages = _plain(row["messages"])
    if not messages:
        return None, "more than texts: tools, pictures, or turns out of order"
    if row["better_answer"]:
        answer, why = row["better_answer"], BETTER
    elif row["rating"] == "up":
        answer, why = row["answer"], PRAISED
        if row["finish_reason"] != WHOLE:
            return None, "praised, but the answer was cut"
    else:
        answer, why = row["answer"], BAD
    if not answer or not answer.strip():
        return None, "the answer is empty"
    source = {name: row[name] for name in ("completion_id", "key_name", "version", "created_s")}
    kept = {"group": f"feedback {row['completion_id']}", "split": "train", "why": why, "comment": row["comment"]}
    return {"messages": [*messages, {"role": "assistant", "content": answer}], **kept, **source}, ""


def scrub_row(row: Fields, scrubber: Scrubber) -> Fields:
    """Return the row without personal data in its texts, and with how much of each kind was taken out."""
    counts: Counter[str] = Counter()

    def scrub(text: str) -> str:
        scrubbed = scrubber.scrub(text)
        counts.update(scrubbed.counts)
        return scrubbed.text

    messages = [{**message, "content": scrub(message["content"])} for message in row["messages"]]
    comment = row["comment"] and scrub(row["comment"])
    return {**row, "messages": messages, "comment": comment, "scrubbed": dict(sorted(counts.items()))}


def _identity(row: Fields) -> tuple[str, float]:
    """Tell one opinion from another: who thinks again has said something new of the same answer."""
    return row["completion_id"], row["created_s"]


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
