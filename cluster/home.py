"""The one folder for everything that a run leaves behind, and how to write into it without half-written files.

Knows places. Does not know what is kept there.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import ClusterError
from configs.schema import Environment

BYTES_PER_GIB = 2**30
BYTES_PER_MIB = 2**20
OWNER_ONLY = 0o600


def home_folder() -> Path:
    """Return `.tandem` (or TANDEM_HOME) as an absolute path, made if it is not there."""
    home = Environment().tandem_home.expanduser().resolve()
    with writing(home, "set TANDEM_HOME to a folder of your own"):
        home.mkdir(parents=True, exist_ok=True)
    return home


def log_folder() -> Path:
    """Return the folder for logs: LOG_DIR, or `logs` inside the home folder."""
    folder = (Environment().log_dir or home_folder() / "logs").expanduser().resolve()
    with writing(folder, "set LOG_DIR to a folder of your own"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing(target: Path, remedy: str = "name another place") -> Iterator[None]:
    """Have an error with a remedy where a place that the user named cannot be written to.

    Raises:
        ClusterError: The system refuses it, or has no room.
    """
    try:
        yield
    except OSError as error:
        raise ClusterError(f"cannot write {target}", str(error), remedy) from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place at the end, whole or not at all.

    If another process made `target` meanwhile, its folder stays: both wrote the same thing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(file: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all; `mode` holds from its first byte."""
    with _draft(file, text, mode) as draft:
        draft.replace(file)


def write_text_once(file: Path, text: str, mode: int = 0o644) -> str:
    """Write a file unless it is there; return what it says, which may be another process's text."""
    if not file.exists():
        with _draft(file, text, mode) as draft, suppress(FileExistsError):
            file.hardlink_to(draft)
    return file.read_text(encoding="utf-8")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep two commands from writing over each other: wait until no other holds the lock, which a process loses when it ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _draft(file: Path, text: str, mode: int) -> Iterator[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def require_disk(num_free_gib: float) -> None:
    """Refuse to start what the disk has no room for.

    Raises:
        ClusterError: Less than `num_free_gib` is free where the home folder lies.
    """
    home = home_folder()
    free_gib = shutil.disk_usage(home).free / BYTES_PER_GIB
    if free_gib < num_free_gib:
        raise ClusterError(
            f"no room on disk: {free_gib:.1f} GiB free under {home}",
            f"{num_free_gib:.1f} GiB are wanted (min_disk_free_gib)",
            "delete old runs there, or set TANDEM_HOME to a folder on a larger disk",
        )
