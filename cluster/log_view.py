"""`python -m cluster logs`: what was logged, as people read it, or as it is written for whoever reads it next.

What runs in the foreground follows its machine's streams likewise: all other processes' standard output is a file.

Knows the streams' files. Does not know what they say.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.home import log_folder
from cluster.logs import STREAMS, paint, stream_file
from cluster.shared_file import aside
from configs.errors import ConfigError

LOOK_EVERY_S = 0.5
LAST_LINES_S = 5.0  # at the end: whoever has standard output may not read it


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


@contextmanager
def showing_streams() -> Iterator[None]:
    """Print what comes into this machine's streams, from now until the end of the block."""
    tails = [Tail(stream_file(log_folder(), name), only_new=True) for name in STREAMS]
    over = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = over.wait(LOOK_EVERY_S)
            with suppress(OSError, ValueError):  # of a full disk, or where nobody reads any more
                _print([line for tail in tails for line in tail.lines()])

    follower = threading.Thread(target=follow, name="logs", daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join(LAST_LINES_S)


class Tail:
    """The lines of one stream that were not read yet."""

    def __init__(self, file: Path, only_new: bool = False) -> None:
        """Begin with what was put aside last; with `only_new` with what is not written yet."""
        self.file = file
        self._stream = _opened(file if only_new else aside(file, 1))
        if self._stream and only_new:
            self._stream.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        """Yield what is new."""
        while True:
            is_another = self._is_another()  # asked first: what is written to the old one until then is read
            while self._stream and (line := self._stream.readline()):
                if not line.endswith(b"\n"):  # its writer is at it
                    self._stream.seek(-len(line), os.SEEK_CUR)
                    break
                yield line.decode(errors="replace")
            if not is_another:
                return
            if self._stream:
                self._stream.close()
            self._stream = _opened(self.file)

    def _is_another(self) -> bool:
        """Whether there is a file by now that is not the one that is read."""
        try:
            there = self.file.stat()
        except FileNotFoundError:
            return False
        return self._stream is None or there.st_ino != os.fstat(self._stream.fileno()).st_ino


def _opened(file: Path) -> BinaryIO | None:
    """Open a file to read; None where it is not there, or not yet."""
    try:
        return file.open("rb")
    except FileNotFoundError:
        return None


def _with(text: str, lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if text in line)


def _print(lines: Sequence[str]) -> None:
    """Print lines in the order of their time, with which each begins."""
    if lines:
        told = map(paint, sorted(lines)) if sys.stdout.isatty() else (line.rstrip("\n") for line in sorted(lines))
        print(*told, sep="\n", flush=True)
