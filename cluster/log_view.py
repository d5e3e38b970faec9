"""`python -m cluster logs`: what was logged, as people read it, or as it is written for whoever reads it next.

Knows the streams' files. Does not know what they say.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.home import log_folder
from cluster.logs import STREAMS, paint, stream_file
from cluster.shared_file import aside
from configs.errors import ConfigError

LOOK_EVERY_S = 0.5


def show(streams: Sequence[str], num_last: int, find: str, follow: bool) -> None:
    """Print the newest lines of some streams, in the order of their time, and with `follow` those that come.

    Raises:
        ConfigError: There is no such stream.
    """
    if unknown := [name for name in streams if name not in STREAMS]:
        raise ConfigError(f"there is no stream {unknown[0]!r}", f"there are: {', '.join(STREAMS)}", "python -m cluster logs")
    tails = [Tail(stream_file(log_folder(), name)) for name in streams or STREAMS]
    newest = [line for tail in tails for line in deque(_with(find, tail.lines()), maxlen=num_last)]
    _print(sorted(newest)[max(0, len(newest) - num_last) :])
    if not newest and num_last and not follow:
        print(f"no line has {find!r} in it" if find else "nothing was logged yet", log_folder(), sep=": ", file=sys.stderr)
    while follow:
        time.sleep(LOOK_EVERY_S)
        _print([line for tail in tails for line in _with(find, tail.lines())])


class Tail:
    """The lines of one stream that were not read yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        before = aside(file, 1)
        self._stream = before.open("rb") if before.exists() else None

    def lines(self) -> Iterator[str]:
        """Yield what is new; the first time all of it, with what was put aside last."""
        while True:
            while self._stream and (line := self._stream.readline()):
                if not line.endswith(b"\n"):  # its writer is at it
                    self._stream.seek(-len(line), os.SEEK_CUR)
                    break
                yield line.decode(errors="replace")
            if not self._is_another():
                return
            if self._stream:
                self._stream.close()
            self._stream = self.file.open("rb")

    def _is_another(self) -> bool:
        """Whether there is a file by now that is not the one that is read."""
        try:
            there = self.file.stat()
        except FileNotFoundError:
            return False
        return self._stream is None or there.st_ino != os.fstat(self._stream.fileno()).st_ino


def _with(text: str, lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if text in line)


def _print(lines: Sequence[str]) -> None:
    """Print lines in the order of their time, with which each begins."""
    on_terminal = sys.stdout.isatty()
    for line in sorted(lines):
        print(paint(line) if on_terminal else line.rstrip("\n"), flush=True)
