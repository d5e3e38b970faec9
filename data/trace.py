"""Where the rows of a version came from: from its manifest back to files, lines and feedback.

Knows the registry and prepared rows. Does not know how rows are prepared or trained on.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.home import home_folder
from cluster.registry import Version
from configs.cli import console
from configs.errors import DataError
from data.conversations import Conversation, read_prepared
from data.prepare import FORGOTTEN_FILE
from data.sources import FEEDBACK_SOURCE, dvc_hash, known_to_dvc

NUM_SHOWN_ROWS = 20


@dataclass(frozen=True)
class Trace:
    """One version and the rows that it was trained and measured on; no rows where they are no longer here."""

    version: Version
    rows: list[Conversation] | None
    num_forgotten: int


def prepared_folder(version: Version) -> Path:
    """Return where the rows of a version lie, or lay."""
    return home_folder() / "data" / f"{version.chatbot}-{version.tags.get('data_fingerprint', 'unknown')}"


def trace(version: Version) -> Trace:
    """Find the rows of a version.

    Raises:
        DataError: They are there, but damaged.
    """
    folder = prepared_folder(version)
    files = [folder / "train.jsonl", folder / "heldout.jsonl"]
    rows = [row for file in files for row in read_prepared(file)] if all(file.is_file() for file in files) else None
    return Trace(version, rows, num_forgotten(folder))


def num_forgotten(folder: Path) -> int:
    """Return how many rows `python -m data forget` took out of prepared data since it was made."""
    file = folder / FORGOTTEN_FILE
    return int(json.loads(file.read_text(encoding="utf-8"))["num_rows"]) if file.is_file() else 0


def show_trace(found: Trace) -> None:
    """Print the version, its sources, and how many of its rows came from where."""
    tags = found.version.tags
    finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(tags.get("finished_s", 0))))
    console.print(
        f"[bold]{found.version.name}[/]  trained {finished}, run {found.version.run_id}, code {tags.get('git_commit', 'unknown')}"
    )
    console.print(f"data     {tags.get('data_fingerprint', 'unknown')}", markup=False)
    for source, wanted in json.loads(tags.get("data_sources", "{}")).items():
        console.print(f"source   {source}  {wanted}{_today(source, wanted)}", markup=False, soft_wrap=True)
    if found.rows is None:
        console.print(f"[yellow]no rows[/]  {prepared_folder(found.version)} is gone: nothing more can be said of its rows")
        console.print("         from the same sources and code, python -m data prepare CONFIG makes them again")
        return
    for line in (*_by_origin(found.rows), *_by_feedback(found.rows)):
        console.print(line, markup=False)
    if found.num_forgotten:
        console.print(f"[yellow]forgotten[/]  {found.num_forgotten} rows that it was trained on were taken out since; train it again")


def show_rows_with(found: Trace, text: str) -> None:
    """Print the rows that hold a text, each with where it came from.

    Raises:
        DataError: None does.
    """
    rows = [row for row in found.rows or [] if any(text.casefold() in message.content.casefold() for message in row.messages)]
    if not rows:
        raise DataError(f"no row of {found.version.name} holds {text!r}", "", "give fewer words, as they stand in the row")
    for row in rows[:NUM_SHOWN_ROWS]:
        console.print(f"[bold]{row.origin}[/]  {row.split}, {_kind(row)}")
        for message in row.messages:
            console.print(f"  {message.role}: {message.content}", markup=False)
    if len(rows) > NUM_SHOWN_ROWS:
        console.print(f"and {len(rows) - NUM_SHOWN_ROWS} more")


def _today(source: str, wanted: str) -> str:
    """Say whether the source is still the one that was trained on, and whether DVC keeps it."""
    path = Path(source).expanduser()
    known = f"; DVC: {', '.join(paths)}" if (paths := known_to_dvc(Path(), wanted)) else ""
    if source == FEEDBACK_SOURCE:
        return known
    state = "is gone" if not path.exists() else "unchanged" if dvc_hash(path) == wanted else "has changed since"
    return f"  ({state}{known})"


def _by_origin(rows: list[Conversation]) -> Iterator[str]:
    counts = Counter((row.origin.rpartition(":")[0], _kind(row), row.split) for row in rows)
    for origin, kind in sorted({(origin, kind) for origin, kind, _ in counts}):
        yield f"rows     {counts[origin, kind, 'train']} train, {counts[origin, kind, 'heldout']} held out: {origin}, {kind}"


def _by_feedback(rows: list[Conversation]) -> Iterator[str]:
    for feedback in sorted((row.feedback for row in rows if row.feedback), key=lambda feedback: feedback.created_s):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(feedback.created_s))
        key = f"key {feedback.key_name}" if feedback.key_name else "no key"
        yield f"feedback {at}  {key}, on {feedback.version}: {feedback.completion_id}"


def _kind(row: Conversation) -> str:
    if row.feedback:
        return "feedback"
    return f"synthetic ({row.synthetic})" if row.synthetic else "as written"
