"""One archive of everything in the home folder that cannot be made again, taken while the cluster runs and writes.

Knows files, SQLite and checksums. Does not know what is in them: what is made again by itself is named here, and all else is kept.
`cluster.restore` puts it back.
"""

import gzip
import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

from cluster.home import OWNER_ONLY, home_folder, writing
from cluster.versions import tandem_version
from configs.errors import ClusterError
from configs.schema import Environment

LEFT_OUT = (
    *("adapters", "fetched", "models", "monitoring"),  # fetched or made again
    *("activity", "activity_elsewhere", "chat.json", "cluster.json", "env"),  # of this machine and moment
    *("alertmanager", "alloy", "logs", "loki", "prometheus"),  # what was seen, which grows without end
    "lost+found",  # of a disk, whose root the home folder may be
    *("runs", "sweeps"),  # checkpoints, which are large and change all the time: a job that had some begins anew
)
LEFT_OUT_ENDINGS = (".lock", "-wal", "-shm", "-journal")  # the last three are SQLite's own: what is in them is in the copy
SQLITE_MARK = b"SQLite format 3\0"
# What refers goes before what is referred to: a job names its run, and the registry its artifacts, which are files.
FIRST = ("queue.db", "feedback.db", "mlflow/mlflow.db")
MANIFEST, FOLDER = "manifest.json", "home"
FORMAT = 1
NUM_TRIES = 5


@dataclass(frozen=True)
class Content:
    """What one file of a backup holds."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Contents:
    """What a backup says of itself; the files by their path in the home folder."""

    tandem: str
    made_at: str
    files: dict[str, Content]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together, before they were compressed."""
        return sum(file.num_bytes for file in self.files.values())


def kept_entries(home: Path) -> list[Path]:
    """Return what a backup takes of the home folder's own files and folders."""
    entries = (entry for entry in home.iterdir() if not entry.name.startswith("."))  # hidden ones are half-written
    return sorted(entry for entry in entries if entry.name not in LEFT_OUT and not entry.name.endswith(LEFT_OUT_ENDINGS))


def back_up(target: Path) -> Contents:
    """Write the archive beside and rename it into place; the cluster may run, and write, meanwhile.

    Raises:
        ClusterError: The file would lie in the home folder itself or cannot be written, there is nothing to back up, or a file never held
            still.
    """
    home, target = home_folder(), target.expanduser().resolve()
    if target.is_relative_to(home):
        raise ClusterError("a backup cannot lie inside what it backs up", f"{target} is in {home}", "another folder, better another disk")
    if target.is_dir():
        raise ClusterError(f"{target} is a folder", "a backup is one file", f"python -m cluster backup {target / 'tandem.tar.gz'}")
    if next(_in_order(home), None) is None:
        raise ClusterError("there is nothing to back up", f"{home} holds nothing that could not be made again", "python -m cluster up")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:  # for nobody else to see
            draft = Path(folder) / "archive"
            with draft.open("wb") as stream:
                os.fchmod(stream.fileno(), OWNER_ONLY)
                contents = _write(stream, home, Path(folder) / "copy")
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(target)
    return contents


def kept_elsewhere(environment: Environment) -> list[str]:
    """Return what a backup of this home folder lacks, since the environment says that it lies elsewhere."""
    mlflow = bool(environment.mlflow_tracking_uri) and not (home_folder() / "mlflow").exists()
    registry = "the registry with its adapters, which MLFLOW_TRACKING_URI names"
    feedback = environment.feedback_url and f"/{home_folder()}/" not in environment.feedback_url.get_secret_value()
    return [*([registry] if mlflow else []), *(["feedback, which FEEDBACK_URL names"] if feedback else [])]


def _in_order(home: Path) -> Iterator[Path]:
    """Yield the files to keep: databases first; the others are looked for after those are copied, so that what they name is found."""
    first = [home / name for name in FIRST]
    yield from (file for file in first if file.is_file())
    found = (file for entry in kept_entries(home) for file in (entry.rglob("*") if entry.is_dir() else [entry]))
    kept = (file for file in found if file.is_file() and not file.is_symlink() and not file.name.endswith(LEFT_OUT_ENDINGS))
    yield from sorted(file for file in kept if file not in first)


def _write(stream: IO[bytes], home: Path, copy: Path) -> Contents:
    told: dict[str, Content] = {}
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as squeezed, tarfile.open(fileobj=squeezed, mode="w") as archive:
        for file in _in_order(home):
            try:
                _copy(file, copy)
            except FileNotFoundError:
                continue  # it went away since it was found
            name = file.relative_to(home).as_posix()
            entry = archive.gettarinfo(copy, f"{FOLDER}/{name}")
            with copy.open("rb") as content:
                told[name] = Content(hashlib.file_digest(content, "sha256").hexdigest(), entry.size)
                content.seek(0)
                archive.addfile(_anonymous(entry), content)
        contents = Contents(tandem_version(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), told)
        words = json.dumps({"format": FORMAT, **asdict(contents)}, indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size, entry.mode = len(words), OWNER_ONLY
        archive.addfile(entry, BytesIO(words))
    return contents


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who owned a file here: whoever restores it owns it there."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _copy(file: Path, copy: Path) -> None:
    """Copy a file as it is at one moment, with its mode."""
    copy.unlink(missing_ok=True)
    with file.open("rb") as source:
        mode, mark = os.fstat(source.fileno()).st_mode & 0o777, source.read(len(SQLITE_MARK))
    if mark == SQLITE_MARK:
        _copy_database(file, copy)
    else:
        _copy_still(file, copy)
    copy.chmod(mode)


def _copy_database(file: Path, copy: Path) -> None:
    """Copy a database in one go: those who write wait for it, or see to it that it sees them whole."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    except sqlite3.Error as error:
        raise ClusterError("a database cannot be copied", f"{file}: {error}", "python -m cluster doctor, then try again") from None


def _copy_still(file: Path, copy: Path) -> None:
    """Copy a file that nobody wrote to meanwhile; most are renamed into place whole anyway."""
    for _ in range(NUM_TRIES):
        with file.open("rb") as source, copy.open("wb") as target:
            before = os.fstat(source.fileno())
            while chunk := source.read(2**20):
                target.write(chunk)
            after = os.fstat(source.fileno())
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
            return
    raise ClusterError("a file changes all the time", f"{file} was another one at each of {NUM_TRIES} looks", "try again")
