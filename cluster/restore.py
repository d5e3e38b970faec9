"""Puts a backup back into a home folder: whole and checked, or not at all.

Knows the archive that `cluster.backup` writes, and that no cluster may run on it. Trusts nothing in it before its checksum.
"""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from cluster.backup import FOLDER, FORMAT, MANIFEST, Content, Contents, kept_entries
from cluster.home import OWNER_ONLY, home_folder
from cluster.job_queue import Queue
from cluster.session import read_session
from cluster.stack import session_lock
from configs.errors import ClusterError

MAX_MANIFEST_BYTES = 256 * 2**20
MODES = 0o755  # nobody else writes what is restored


def restore(source: Path, replace: bool = False) -> tuple[Contents, Path | None]:
    """Put a backup into the home folder; return what it held, and where that lies which it took the place of.

    Args:
        source: The archive.
        replace: Take the place of what is there, which is moved aside and not deleted.

    Raises:
        ClusterError: The cluster is up, the home folder is not empty, or the archive is not there or not whole.
    """
    if not source.exists():
        raise ClusterError(f"there is no file {source}", remedy="python -m cluster backup FILE writes one")
    home = home_folder()
    with session_lock():
        _require_down()
        there = kept_entries(home)
        if there and not replace:
            names = ", ".join(entry.name for entry in there[:5])
            why = f"{home} has {names}{' and more' if len(there) > 5 else ''}"
            raise ClusterError("the home folder is not empty", why, "set TANDEM_HOME to another folder, or --replace moves these aside")
        # Inside the home folder, which may be a disk of its own: renaming takes no time and cannot half succeed with a file.
        draft = Path(tempfile.mkdtemp(prefix=".restore-", dir=home))
        try:
            contents = _unpack(source, draft)
            if (queue := draft / FOLDER / "queue.db").is_file():
                with Queue(queue) as line:
                    line.forget_runs()  # their checkpoints are not in a backup
            aside = _move_aside(there, home)
            for entry in sorted((draft / FOLDER).iterdir()):
                entry.rename(home / entry.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return contents, aside


def _require_down() -> None:
    session = read_session()
    if session and any(process.running() for process in session.processes):
        raise ClusterError("the cluster is up", "it would go on writing what is replaced", "python -m cluster down")
    with (home_folder() / "mlflow.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "it would go on writing what is replaced"
            raise ClusterError("MLflow runs on this home folder", why, "end `python -m cluster run mlflow`") from None


def _move_aside(entries: list[Path], home: Path) -> Path | None:
    if not entries:
        return None
    aside = home / f".replaced-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir(mode=0o700)
    for entry in entries:
        entry.rename(aside / entry.name)
    return aside


def _unpack(source: Path, draft: Path) -> Contents:
    """Unpack into a folder for nobody else to see, and hold each file against the manifest."""
    found: dict[str, Content] = {}
    told = b""
    with _readable(source) as archive:
        for entry in archive:
            name = entry.name.removeprefix(f"{FOLDER}/")
            if entry.name == MANIFEST and entry.isreg() and entry.size <= MAX_MANIFEST_BYTES:
                told = _content(archive, entry)
            elif entry.isreg() and entry.name != name and name not in found:
                found[name] = _extract(archive, entry, draft, source)
            else:
                raise _damaged(source, f"{entry.name!r} is not what a backup holds")
    contents = _read_manifest(source, told)
    wrong = sorted(name for name in contents.files.keys() | found.keys() if contents.files.get(name) != found.get(name))
    if wrong or not found:
        raise _damaged(source, f"{', '.join(wrong[:5]) or 'no file'} {'is' if len(wrong) < 2 else 'are'} not as the manifest says")
    return contents


def _extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, draft: Path, source: Path) -> Content:
    """Write one file, and tell what it holds. By hand: the Python of Debian 12 cannot refuse paths that lead out of the folder."""
    file = draft / entry.name
    if not file.resolve().is_relative_to(draft.resolve()):
        raise _damaged(source, f"{entry.name!r} leads out of it")
    file.parent.mkdir(parents=True, exist_ok=True)
    with archive.extractfile(entry) or BytesIO() as packed, file.open("xb") as unpacked:
        os.fchmod(unpacked.fileno(), entry.mode & MODES | OWNER_ONLY)
        shutil.copyfileobj(packed, unpacked)
    with file.open("rb") as stream:
        return Content(hashlib.file_digest(stream, "sha256").hexdigest(), file.stat().st_size)


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(entry)
    return stream.read() if stream else b""


def _read_manifest(source: Path, told: bytes) -> Contents:
    try:
        values: dict[str, Any] = json.loads(told)
        if (made_as := values.pop("format")) != FORMAT:
            why = f"it has format {made_as}, and this Tandem reads {FORMAT}"
            raise ClusterError(f"{source} was written by another Tandem", why, "restore it with the Tandem that wrote it, then upgrade")
        return Contents(**{**values, "files": {name: Content(**file) for name, file in values["files"].items()}})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(source, "its manifest is missing, or cannot be read") from None


@contextmanager
def _readable(source: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive; what goes wrong while it is read is an error with a remedy."""
    try:
        with tarfile.open(source, "r:gz") as archive:
            yield archive
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(source, str(error)) from None
    except OSError as error:  # of the disks, and no fault of the archive's
        raise ClusterError(f"{source} cannot be unpacked", str(error), "a file that may be read, and room where TANDEM_HOME is") from None


def _damaged(source: Path, why: str) -> ClusterError:
    return ClusterError(f"{source} is no whole backup", why, "take another one; nothing was changed here")
