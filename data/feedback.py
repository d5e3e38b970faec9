"""From stored conversations with thumbs to rows that a person reviews, and to those that training may read.

Knows which feedback makes a good conversation, and where rows wait. Does not know how feedback is stored or scrubbed.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.home import OWNER_ONLY, home_folder, locked, write_text
from configs.errors import DataError
from data.conversations import to_jsonl
from data.feedback_store import Row
from data.formats import why_unusable
from data.scrub import Scrubber

TOOL_FIELDS = ("tool_calls", "function_call")
PLAIN_ROLES = ("system", "user", "assistant")
WHOLE = "stop"  # the engine's reason for an answer that ended by itself
PENDING, ACCEPTED, DECLINED, REJECTED = "pending.jsonl", "accepted.jsonl", "declined.jsonl", "rejected.jsonl"
REPORT = "report.json"
BETTER, PRAISED, BAD = "better answer", "praised", "rejected"
Fields = dict[str, Any]
Identity = tuple[str, float]  # completion id and time of the opinion


class _Decided(BaseModel):
    """What is kept of a row that somebody declined."""

    model_config = ConfigDict(strict=True)

    completion_id: str
    created_s: float
    key_name: str | None


class _Reviewed(_Decided):
    """What a row needs to be shown to a person, whatever they changed in it."""

    version: str
    why: str
    comment: str | None
    scrubbed: dict[str, int]


@dataclass
class Gathered:
    """What one look at the feedback found."""

    pending: list[Fields] = field(default_factory=list)
    rejected: list[Fields] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_decided: int = 0
    num_withdrawn: int = 0

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
        """Return the rows of one of the four files.

        Raises:
            DataError: A row is not as it was written, perhaps after somebody mended the file by hand.
        """
        return read_rows(self.folder / name, _why_no_decision if name == DECLINED else _why_no_review)

    def write(self, name: str, rows: Iterable[Fields]) -> None:
        """Replace one of the four files."""
        write_text(self.folder / name, to_jsonl(rows), OWNER_ONLY)

    def gather(self, opinions: Callable[[], list[Row]], since_s: float, scrubber: Callable[[], Scrubber]) -> Gathered:
        """Sort feedback into rows to review and rejected ones, scrubbed, and write both with a report.

        What waits already stays as it is, so that a person's own corrections in the file are kept; what was decided on does not come again.
        What was accepted is withdrawn where the same person has said something new of the answer since.

        Args:
            opinions: Reads all feedback on this chatbot; under the lock, so that what is forgotten meanwhile does not come back.
            since_s: Feedback from before this moment is left alone.
            scrubber: Makes the scrubber, if there is anything to scrub.
        """
        with review_lock():
            rows = opinions()
            newest = {row["completion_id"]: row["created_s"] for row in rows}
            accepted, gathered = self.read(ACCEPTED), Gathered()
            kept = [row for row in accepted if newest.get(row["completion_id"], row["created_s"]) == row["created_s"]]
            if len(kept) < len(accepted):
                gathered.num_withdrawn = len(accepted) - len(kept)
                self.write(ACCEPTED, kept)
            decided = {_identity(row) for row in (*kept, *self.read(DECLINED))}
            known = {name: self._still_said(name, newest, decided) for name in (PENDING, REJECTED)}
            _sort([row for row in rows if row["created_s"] >= since_s], decided, known, gathered, cache(scrubber))
            gathered.pending, gathered.rejected = (list(known[name].values()) for name in (PENDING, REJECTED))
            self.write(PENDING, gathered.pending)
            self.write(REJECTED, gathered.rejected)
            self._report(gathered, since_s)
        return gathered

    def _still_said(self, name: str, newest: dict[str, float], decided: set[Identity]) -> dict[str, Fields]:
        """Return the rows of a file, by their answer, whose opinion is the newest one and not decided on."""
        rows = ((_identity(row), row) for row in self.read(name))
        return {one[0]: row for one, row in rows if newest.get(one[0]) == one[1] and one not in decided}

    def decide(self, accepted: list[Fields], declined: list[Fields]) -> None:
        """Take rows out of the review: the accepted ones are trained on from now on, the declined ones never.

        A row that waits no more, because it was forgotten or decided on meanwhile, is left alone.
        """
        with review_lock():
            waiting = {_identity(row): row for row in self.read(PENDING)}
            accepted, declined = ([row for row in rows if waiting.pop(_identity(row), None)] for rows in (accepted, declined))
            # What was accepted before and rated anew is replaced or, where the new row is declined, taken out.
            renewed = {row["completion_id"] for row in (*accepted, *declined)}
            before = self.read(ACCEPTED)
            kept = [row for row in before if row["completion_id"] not in renewed]
            if accepted or len(kept) < len(before):
                self.write(ACCEPTED, [*kept, *accepted])
            if declined:
                self.write(DECLINED, [*self.read(DECLINED), *({name: row[name] for name in _Decided.model_fields} for row in declined)])
            self.write(PENDING, waiting.values())

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


def review_lock() -> AbstractContextManager[None]:
    """Let one command at a time change rows that came from feedback, of whatever chatbot."""
    return locked(home_folder() / "feedback.lock")


def accepted_file(chatbot: str) -> Path:
    """Return where the rows lie that a person accepted for this chatbot."""
    return home_folder() / "feedback" / chatbot / ACCEPTED


def read_rows(file: Path, why_bad: Callable[[Fields], str] = lambda _: "") -> list[Fields]:
    """Read a file of rows; none where it is not there.

    Raises:
        DataError: It was damaged, perhaps by hand, or `why_bad` says something of a row.
    """
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}:{number} is not JSON", str(error), "mend the line or remove it") from None
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number} is no object with fields", f"it is a {type(row).__name__}", "mend the line or remove it")
            if reason := why_bad(row):
                raise DataError(f"{file}:{number} {reason}", "", "mend the line or remove it")
            rows.append(row)
    return rows


def _why_no_review(row: Fields) -> str:
    return _why_no_decision(row, _Reviewed) or why_unusable(row)


def _why_no_decision(row: Fields, wanted: type[_Decided] = _Decided) -> str:
    try:
        wanted.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"has a wrong {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ""


def _sort(
    rows: list[Row], decided: set[Identity], known: dict[str, dict[str, Fields]], gathered: Gathered, scrubber: Callable[[], Scrubber]
) -> None:
    """Put each new opinion among the rows to review or the rejected ones, or count it as left out."""
    for row in rows:
        if _identity(row) in decided:
            gathered.num_decided += 1
            continue
        made, reason = as_conversation(row)
        if made is None:
            gathered.left_out[reason] += 1
        elif not any(row["completion_id"] in those for those in known.values()):
            known[REJECTED if made["why"] == BAD else PENDING][row["completion_id"]] = scrub_row(made, scrubber())


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


def _identity(row: Fields) -> Identity:
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
