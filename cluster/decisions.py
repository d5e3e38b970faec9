"""What gates decided, and when: a line of JSON each in `gate.jsonl` in the home folder, for those who watch over a cluster.

The registry has the reasons. Does not know what a gate looks at.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.home import home_folder


@dataclass(frozen=True)
class Decided:
    """One decision of a gate about a version."""

    at_s: float
    chatbot: str
    version: str
    decision: str


def note_decision(chatbot: str, version: str, decision: str) -> None:
    """Add a line; several processes may do so at once."""
    line = json.dumps(asdict(Decided(time.time(), chatbot, version, decision))) + "\n"
    descriptor = os.open(_file(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_decisions() -> list[Decided]:
    """Return all decisions, oldest first; a line that cannot be read is left out, as of a disk that was full, or of another Tandem."""
    found = []
    with suppress(FileNotFoundError):
        for line in _file().read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                found.append(Decided(**json.loads(line)))
    return found


def _file() -> Path:
    return home_folder() / "gate.jsonl"
