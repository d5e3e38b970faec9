"""Forgets a person: finds their rows wherever Tandem keeps them, and the pages that show one, takes them out, and names who saw them.

Knows the places where rows lie. Does not know how they came there.
"""

import html
import json
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.home import OWNER_ONLY, home_folder, write_text
from cluster.registry import Registry, Version, evaluation_page
from configs.cli import console
from configs.errors import DataError
from data.conversations import to_jsonl
from data.copies import drop_copy, has_copy
from data.feedback import read_rows
from data.feedback_store import delete_rows, stored_rows
from data.prepare import FORGOTTEN_FILE
from data.trace import num_forgotten, prepared_folder

MIN_LETTERS = 3
NUM_SHOWN_PLACES = 20
DVC_FOLDER, DVC_CACHE = Path("data/prepared"), Path(".dvc/cache")
TRAIN, HELDOUT = "train.jsonl", "heldout.jsonl"
ESCAPED = re.compile(r"\\(?:u[0-9a-fA-F]{4}|[\"\\/bfnrt])")
GONE_PAGE = "<!doctype html><p>This evaluation held rows of a person who was forgotten. python -m train evaluate {} makes a new one.</p>\n"
Fields = dict[str, Any]
IsTheirs = Callable[[Fields], bool]


@dataclass
class Found:
    """All rows of one person, by the place where they lie."""

    stored: set[str] = field(default_factory=set)  # completion ids in the database
    files: dict[Path, int] = field(default_factory=dict)  # files of ours, with the number of rows to take out
    pages: list[Path | Version] = field(default_factory=list)  # evaluations on this machine, and of versions in MLflow
    copies: list[str] = field(default_factory=list)  # prepared data in the cluster's storage, by name
    own_places: list[str] = field(default_factory=list)  # file:line in files of the user's, which are not touched
    versions: list[Version] = field(default_factory=list)  # trained on such rows, or measured on them
    earlier: list[Version] = field(default_factory=list)  # of whose rows somebody's were forgotten before
    unknown: list[Version] = field(default_factory=list)  # whose rows are no longer here

    @property
    def num_rows(self) -> int:
        """How many rows are to go."""
        return len(self.stored) + sum(self.files.values())


def by_key(name: str) -> IsTheirs:
    """Recognise rows of what was asked, answered and said with one key."""

    def is_theirs(row: Fields) -> bool:
        feedback = row.get("feedback")
        return name in (row.get("key_name"), feedback.get("key_name") if isinstance(feedback, dict) else None)

    return is_theirs


def by_text(text: str) -> IsTheirs:
    """Recognise rows that hold a text, such as a mail address, as whole words, in any case and Unicode spelling, over line breaks too.

    Raises:
        DataError: The text is so short that it would be found everywhere.
    """
    words = unicodedata.normalize("NFC", text).split()
    if len(" ".join(words)) < MIN_LETTERS:
        raise DataError(f"{text!r} is too short", f"it has under {MIN_LETTERS} letters, and would be found everywhere", "give a whole name")
    written = r"\s+".join(map(re.escape, words))
    pattern = re.compile(rf"(?<!\w){written}(?!\w)", re.IGNORECASE)
    return lambda row: any(pattern.search(unicodedata.normalize("NFC", found)) for found in _texts(row))


def is_wanted(row: Fields, stored: set[str], is_theirs: IsTheirs) -> bool:
    """Tell whether a row is about an answer that is to go, or is theirs by itself; also one that was set aside as bad."""
    ids = {row.get("completion_id"), (row.get("feedback") or {}).get("completion_id")}
    return bool(ids & stored) or is_theirs(_unwrapped(row))


def find(is_theirs: IsTheirs, registry: Registry, storage: str = "") -> Found:
    """Look through the database, the rows in review, all prepared data and the evaluations; change nothing.

    Args:
        is_theirs: Recognises their rows.
        registry: Where the versions are.
        storage: The cluster's, which has copies of prepared data; empty without one.
    """
    found = Found({row["completion_id"] for row in stored_rows() if is_theirs(row)})
    home = home_folder()
    places: set[str] = set()
    for file in sorted((*home.glob("feedback/*/*.jsonl"), *home.glob("data/*/*.jsonl"), *DVC_FOLDER.glob("*/*.jsonl"))):
        theirs = [row for row in read_rows(file) if is_wanted(row, found.stored, is_theirs)]
        if theirs:
            found.files[file] = len(theirs)
            places |= {row.get("origin") or row.get("place") or "" for row in theirs if not _unwrapped(row).get("completion_id")}
    prepared = {file.parent.name for file in found.files if file.name in (TRAIN, HELDOUT)}
    prepared |= {file.parent.name for file in home.glob(f"data/*/{FORGOTTEN_FILE}")}  # a clean copy would be laid there again
    found.copies = sorted(name for name in prepared if has_copy(storage, name))
    found.own_places = sorted(place for place in places if place and not place.startswith(str(home)))
    versions = registry.versions()
    for version in versions:
        folder = prepared_folder(version)
        if not folder.is_dir():
            found.unknown.append(version)
        elif found.files.keys() & {folder / TRAIN, folder / HELDOUT}:
            found.versions.append(version)
        elif num_forgotten(folder):
            found.earlier.append(version)
    found.pages = list(_pages(found, is_theirs, registry, versions))
    return found


def forget(found: Found, is_theirs: IsTheirs, registry: Registry, storage: str = "") -> None:
    """Take out what `find` found, each file whole or not at all; the database comes last, so that a broken run can be repeated.

    Pages come first: which of them show a row is known only while the row is there.
    """
    for page in found.pages:
        if isinstance(page, Path):
            page.unlink(missing_ok=True)
        else:
            registry.write_evaluation(page, GONE_PAGE.format(page.name))
    for name in found.copies:
        drop_copy(storage, name)
    for file in found.files:
        rows = read_rows(file)
        kept = [row for row in rows if not is_wanted(row, found.stored, is_theirs)]
        folder, num_gone = file.parent, len(rows) - len(kept)
        if file.name in (TRAIN, HELDOUT):
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
    for name in found.copies:
        console.print(f"copy       {name} in the cluster's storage", markup=False)
        console.print(f"joined     their machines may have it: delete data/{name} in each one's TANDEM_HOME", markup=False)
    for page in found.pages:
        shown = page if isinstance(page, Path) else f"evaluation of {page.name} in MLflow"
        console.print(f"page       {shown}", markup=False)
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


def _pages(found: Found, is_theirs: IsTheirs, registry: Registry, versions: list[Version]) -> Iterator[Path | Version]:
    """Yield the evaluations that asked one of the rows, or in which the text stands."""
    asked = {version.name for version in versions if prepared_folder(version) / HELDOUT in found.files}
    measured = {evaluation_page(version) for version in versions if version.name in asked}
    for file in sorted((home_folder() / "evaluations").glob("*.html")):
        if file in measured or is_theirs(_as_row(file.read_text(encoding="utf-8"))):
            yield file
    for version in versions:
        page = registry.read_evaluation(version)
        if page and page != GONE_PAGE.format(version.name) and (version.name in asked or is_theirs(_as_row(page))):
            yield version


def _as_row(page: str) -> Fields:
    return {"page": html.unescape(page)}


def _named(version: Version) -> str:
    return f"{version.name} ({', '.join(version.aliases)})" if version.aliases else version.name


def _unwrapped(row: Fields) -> Fields:
    """Return the row as it was read, where it was set aside as a bad one; a line that is not JSON without its escapes."""
    if "raw" not in row:
        return row
    try:
        raw = json.loads(row["raw"])
    except (ValueError, RecursionError):
        return {**row, "raw": ESCAPED.sub(lambda found: str(json.loads(f'"{found[0]}"')), row["raw"])}
    return raw if isinstance(raw, dict) else {**row, "raw": raw}


def _texts(row: Fields) -> Iterator[str]:
    """Yield all that is written in a row, however deep: texts, numbers and names of fields."""
    left: list[Any] = [row]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += (*value.keys(), *value.values())
        elif isinstance(value, list):
            left += value
        elif value is not None:
            yield str(value)
