"""What the user wants of chat, as `python -m serve` deployed it; the arbiter deploys the same again with other bounds.

Knows one file. Does not know what is in it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.home import home_folder, write_text


@contextmanager
def wish_lock() -> Iterator[None]:
    """Let one at a time change what is deployed."""
    import fcntl

    with (home_folder() / "chat.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def keep_wish(body: dict[str, Any]) -> None:
    """Keep what was deployed."""
    write_text(_wish_file(), json.dumps(body), mode=0o600)


def read_wish() -> dict[str, Any] | None:
    """Return what was deployed last."""
    try:
        found: dict[str, Any] = json.loads(_wish_file().read_text())
    except (OSError, ValueError):
        return None
    return found


def forget_wish() -> None:
    """Forget it, as chat is ended on purpose."""
    _wish_file().unlink(missing_ok=True)


def _wish_file() -> Path:
    return home_folder() / "chat.json"
