"""How each chatbot stands in the registry, and the word that a promotion passes on to the engines of this machine.

The registry is the only truth; the word is what it said just now, so that no engine has to wait for its turn to ask. Knows aliases and
a file. Does not know MLflow.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cluster.home import home_folder, write_text

CANARY = "canary"


@dataclass(frozen=True)
class Standing:
    """All that changes about a chatbot: the versions that its aliases name, what its tags say, and when it last got a version."""

    aliases: dict[str, int]
    tags: dict[str, str]
    changed_ms: int

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """Return the aliases of a version."""
        return tuple(sorted(alias for alias, named in self.aliases.items() if named == number))

    def canary_share(self, number: int) -> float:
        """Return the share of a version that is the canary; 0 for any other, and where the tag says nonsense: anyone may write tags."""
        try:
            share = float(self.tags.get(share_tag(number), 0)) if self.aliases.get(CANARY) == number else 0.0
        except ValueError:
            return 0.0
        return share if 0 < share < 1 else 0.0


def share_tag(number: int) -> str:
    """Return the name of the tag that holds a canary's share."""
    return f"canary_share.{number}"


class Word:
    """The file of the word about one registry; who reads it hears each word once."""

    def __init__(self, url: str) -> None:
        self.url, self._file = url, home_folder() / "standings.json"
        self._heard = self._mark()

    def spread(self, standings: Mapping[str, Standing]) -> None:
        """Pass on what the registry just said."""
        told = {name: asdict(standing) for name, standing in standings.items()}
        write_text(self._file, json.dumps({"url": self.url, "standings": told}))

    def hear(self) -> dict[str, Standing] | None:
        """Return what was passed on since the last time; None where nothing was, or it is about another registry or unreadable."""
        if (mark := self._mark()) == self._heard:
            return None
        self._heard = mark
        try:
            told = json.loads(self._file.read_text(encoding="utf-8"))
            said = {name: Standing(dict(one["aliases"]), dict(one["tags"]), one["changed_ms"]) for name, one in told["standings"].items()}
            return said if told["url"] == self.url else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _mark(self) -> tuple[int, int] | None:
        """Return what tells one word from the next: each is a file of its own."""
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns
