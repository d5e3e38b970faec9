"""Forgets a person: finds every row of theirs that Tandem keeps, takes them out, and names the versions that saw them.

Knows the places where rows lie. Does not know how they came there.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.home import OWNER_ONLY, home_folder, write_text
from cluster.registry import Version
from configs.cli import console
from configs.errors import DataError
from data.conversations import to_jsonl
from data.feedback import read_rows
from data.feedback_store import delete_rows, stored_rows
from data.prepare import FORGOTTEN_FILE
from data.trace import num_forgotten, prepared_folder

MIN_LETTERS = 3
NUM_SHOWN_PLACES = 20
DVC_FOLDER, DVC_CACHE = Path("data/prepared"), Path(".dvc/cache")
Fields = dict[str, Any]
IsTheirs = Callable[[Fields], bool]


@dataclass
class Found:
    """All rows of one person, by the place where they lie."""

    stored: set[str] = field(default_factory=set)  # completion ids in the database
    files: dict[Path, int] = field(default_factory=dict)  # files of ours, with the number of rows to take out
    own_places: list[str] = field(default_factory=list)  # file:line in files of the user's, which are not touched
    versions: list[Version] = field(default_factory=list)  # trained on such rows
    earlier: list[Version] = field(default_factory=list)  # of whose rows somebody's were forgotten before
    unknown: list[Version] = field(default_factory=list)  # whose rows are no longer here

    @property
    def num_rows(self) -> int:
        """How many rows are to go."""
        return len(self.stored) + sum(self.files.values())


def by_key(name: str) -> IsTheirs:
    """Recognise rows of what was asked, answered and said with one key."""

    def is_theirs(row: Fields) -> bool:
        return name in (row.get("key_name"), (row.get("feedback") or {}).get("key_name"))

    return is_theirs


def by_text(text: str) -> IsTheirs:
    """Recognise rows that hold a text, such as a mail address, as whole words and in any case.

    Raises:
        DataError: The text is so short that it would be found everywhere.
    """
    if len(text.strip()) < MIN_LETTERS:
        raise DataError(f"{text!r} is too short", f"it has under {MIN_LETTERS} letters, and would be found everywhere", "give a whole name")
    written = json.dumps(text.strip(), ensure_ascii=False)[1:-1]
    pattern = re.compile(rf"(?<!\w){re.escape(written)}(?!\w)", re.IGNORECASE)
    return lambda row: bool(pattern.search(json.dumps(row, ensure_ascii=False, default=str)))


def find(is_theirs: IsTheirs, versions: list[Version]) -> Found:
    """Look through the database, the rows in review, and all prepared data; change nothing."""
    found = Found({row["completion_id"] for row in stored_rows() if is_theirs(row)})

    def is_wanted(row: Fields) -> bool:
        ids = {row.get("completion_id"), (row.get("feedback") or {}).get("completion_id")}
        return bool(ids & found.stored) or is_theirs(_unwrapped(row))

    home = home_folder()
    places: set[str] = set()
    for file in sorted((*home.glob("feedback/*/*.jsonl"), *home.glob("data/*/*.jsonl"), *DVC_FOLDER.glob("*/*.jsonl"))):
        theirs = [row for row in read_rows(file) if is_wanted(row)]
        if theirs:
            found.files[file] = len(theirs)
            places |= {row.get("origin") or row.get("place") or "" for row in theirs if not _unwrapped(row).get("completion_id")}
    found.own_places = sorted(place for place in places if place and not place.startswith(str(home)))
    touched = {file.parent for file in found.files}
    for version in versions:
        folder = prepared_folder(version)
        if not folder.is_dir():
            found.unknown.append(version)
        elif folder in touched:
            found.versions.append(version)
        elif num_forgotten(folder):
            found.earlier.append(version)
    return found


def forget(found: Found, is_theirs: IsTheirs) -> None:
    """Take out what `find` found, each file whole or not at all; the database comes last, so that a broken run can be repeated."""
    for file in found.files:
        kept = [row for row in read_rows(file) if not _is_gone(row, found, is_theirs)]
        folder, num_gone = file.parent, len(read_rows(file)) - len(kept)
        if file.name in ("train.jsonl", "heldout.jsonl"):
            told = {"num_rows": num_forgotten(folder) + num_gone, "forgotten_s": time.time()}
            write_text(folder / FORGOTTEN_FILE, json.dumps(told) + "\n")
        write_text(file, to_jsonl(kept), OWNER_ONLY if "feedback" in file.parts else 0o644)
    if found.stored:
        delete_rows(found.stored)


def show_found(found: Found) -> None:
    """Print where the rows lie, and what to do with the versions that saw them."""
    console.print(f"database   {len(found.stored)} answers, with what was said of them")
    for file, count in found.files.items():
        console.print(f"rows       {count} in {file}", markup=False)
    for place in found.own_places[:NUM_SHOWN_PLACES]:
        console.print(f"yours      {place}: take it out there yourself, or the next preparation brings it back", markup=False)
    if len(found.own_places) > NUM_SHOWN_PLACES:
        console.print(f"yours      and {len(found.own_places) - NUM_SHOWN_PLACES} more lines")
    for version in found.versions:
        console.print(f"[yellow]saw them[/]   {_named(version)}: train again without them, then promote the new version")
    for version in found.earlier:
        console.print(f"earlier    {_named(version)}: saw rows that were forgotten before, of this person or another; train again")
    if found.unknown:
        names = ", ".join(map(_named, found.unknown))
        console.print(f"unknown    {names}: their prepared rows are gone, so nobody can tell")
    if DVC_CACHE.is_dir() and found.files:
        console.print("DVC        its cache may keep old copies: dvc repro, then dvc gc --workspace, and --cloud where there is a remote")


def _named(version: Version) -> str:
    return f"{version.name} ({', '.join(version.aliases)})" if version.aliases else version.name


def _is_gone(row: Fields, found: Found, is_theirs: IsTheirs) -> bool:
    ids = {row.get("completion_id"), (row.get("feedback") or {}).get("completion_id")}
    return bool(ids & found.stored) or is_theirs(_unwrapped(row))


def _unwrapped(row: Fields) -> Fields:
    """Return the row as it was read, where it was set aside as a bad one."""
    if "raw" not in row:
        return row
    try:
        raw = json.loads(row["raw"])
    except ValueError:
        return row
    return raw if isinstance(raw, dict) else row
