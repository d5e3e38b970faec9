"""A file that several processes append lines to, and put aside when it is full.

Each line is one `write`, which the kernel keeps apart from those of others. Whoever finds the file full renames it under a lock, and the
others see by its inode that there is a new one; a line that one of them wrote meanwhile lies in the old one, whole. (concurrent-log-handler
was weighed: it takes a lock for every line, and that in the loop that answers people.) Does not know what the lines say.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

from cluster.home import locked

FILE_MODE = 0o640


class SharedFile:
    """A file that several processes append lines to, and put aside when it is full."""

    def __init__(self, file: Path, max_bytes: int, num_kept: int) -> None:
        self.file, self.max_bytes, self.num_kept = file, max_bytes, num_kept
        self._lock = threading.Lock()
        self._descriptor, self._inode = -1, 0

    def write(self, line: bytes) -> None:
        """Append a line; one for which there is no room on disk is left out."""
        with self._lock, suppress(OSError):
            inode, size = self._look()
            if inode != self._inode or not inode:
                size = self._open()
            if size and size + len(line) > self.max_bytes:
                self._putaside()
            os.write(self._descriptor, line)

    def _look(self) -> tuple[int, int]:
        try:
            found = os.stat(self.file)  # noqa: PTH116 (half of Path.stat's time, for every line)
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size

    def _open(self) -> int:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor, self._inode = -1, 0  # or a file that cannot be opened now would be thought open for ever
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        found = os.fstat(self._descriptor)
        self._inode = found.st_ino
        return found.st_size

    def _putaside(self) -> None:
        """Begin a new file, unless another process did so meanwhile."""
        with locked(self.file.with_name(f".{self.file.name}.lock")):
            if self._look()[0] == self._inode:
                for number in range(self.num_kept, 0, -1):
                    newer = aside(self.file, number - 1) if number > 1 else self.file
                    with suppress(FileNotFoundError):
                        newer.replace(aside(self.file, number))
            self._open()


def aside(file: Path, number: int) -> Path:
    """Return where a file lies that was put aside; 1 is the newest."""
    return file.with_name(f"{file.name}.{number}")
