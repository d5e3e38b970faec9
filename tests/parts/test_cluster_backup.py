"""Backup and restore: while others write, into another folder, and from archives that somebody tampered with."""

import errno
import gzip
import io
import json
import sqlite3
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cluster.backup import back_up
from cluster.home import write_text
from cluster.job_queue import WAITING, NewJob, Queue
from cluster.restore import restore
from configs.errors import ClusterError


@pytest.fixture
def filled(home) -> Path:
    """A home folder with a bit of everything."""
    with Queue() as line:
        job = line.submit(NewJob("train", "helpdesk", "name: helpdesk"))
        line.begin(job.id, ("card1",), "it is its turn", 1.0)
        line.note_run(job.id, "0" * 32)
    write_text(home / "ray_token", "token", mode=0o600)
    write_text(home / "keys.json", "[]", mode=0o600)
    write_text(home / "evaluations" / "helpdesk-1.html", "<p>page</p>")
    write_text(home / "feedback" / "helpdesk" / "accepted.jsonl", '{"row": 1}\n')
    for made_again in (
        "models/m/weights",
        "logs/card0.log",
        "adapters/a/1",
        "fetched/f/checkpoint",
        "runs/r/checkpoint",
        "cluster.json.lock",
        "activity/1",
        "lost+found/1",
    ):
        write_text(home / made_again, "made again")
    return home


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Write pairs of rows that belong together, all the time."""
    ended = threading.Event()
    with closing(sqlite3.connect(file)) as database:
        database.executescript("PRAGMA journal_mode=WAL; CREATE TABLE pairs (name TEXT, number INTEGER)")

    def write() -> None:
        with closing(sqlite3.connect(file, timeout=30)) as database:
            for number in range(1_000_000):
                if ended.is_set():
                    return
                with database:
                    database.executemany("INSERT INTO pairs VALUES (?, ?)", [("first", number), ("second", number)])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def contents(folder: Path) -> dict[str, bytes]:
    """Return each file's bytes; a lock is no content."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_backup_under_writes_is_whole_and_goes_into_another_folder(filled, tmp_path, monkeypatch):
    with writing(filled / "feedback.db"):
        told = back_up(tmp_path / "all.tar.gz")
    assert (tmp_path / "all.tar.gz").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == [], "no draft is left"
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    assert restore(tmp_path / "all.tar.gz") == (told, None)
    there = tmp_path / "elsewhere"
    assert set(told.files) == {
        "queue.db", "feedback.db", "ray_token", "keys.json", "evaluations/helpdesk-1.html", "feedback/helpdesk/accepted.jsonl",
    }  # fmt: skip
    assert (there / "feedback/helpdesk/accepted.jsonl").read_text() == '{"row": 1}\n'
    assert (there / "ray_token").stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(there / "feedback.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        firsts, seconds = (
            database.execute("SELECT count(*) FROM pairs WHERE name = ?", (name,)).fetchone()[0] for name in ("first", "second")
        )
    assert firsts == seconds, "no transaction is there by half"
    with Queue() as line:
        (job,) = line.jobs()
    assert (job.state, job.run_id, job.cards) == (WAITING, "", ()), "a job begins anew: its checkpoints stayed behind"


def test_a_home_that_is_not_empty_is_left_alone_or_moved_aside(filled, tmp_path):
    back_up(tmp_path / "all.tar.gz")
    write_text(filled / "keys.json", "[1]")
    before = contents(filled)
    with pytest.raises(ClusterError, match="not empty"):
        restore(tmp_path / "all.tar.gz")
    assert contents(filled).keys() == before.keys()
    _, aside = restore(tmp_path / "all.tar.gz", replace=True)
    assert aside is not None
    assert (aside / "keys.json").read_text() == "[1]"
    assert (filled / "keys.json").read_text() == "[]"
    assert (filled / "models/m/weights").is_file(), "what a backup does not hold stays"


def test_a_running_cluster_is_not_written_over(filled, up, tmp_path):
    back_up(tmp_path / "all.tar.gz")
    up()
    with pytest.raises(ClusterError, match="the cluster is up"):
        restore(tmp_path / "all.tar.gz", replace=True)


def test_a_backup_does_not_lie_in_what_it_backs_up(filled):
    with pytest.raises(ClusterError, match="inside what it backs up"):
        back_up(filled / "all.tar.gz")


def test_a_place_that_can_be_no_backup_is_refused(filled, tmp_path):
    with pytest.raises(ClusterError, match=rf"(?s)is a folder.*backup {tmp_path}/tandem.tar.gz"):
        back_up(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ClusterError, match="cannot write"):
        back_up(tmp_path / "file" / "all.tar.gz")


def test_a_disk_that_gives_no_backup_back_is_named(filled, tmp_path, monkeypatch):
    back_up(tmp_path / "whole.tar.gz")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(ClusterError, match="cannot be unpacked"):
        restore(tmp_path)
    monkeypatch.setattr("shutil.copyfileobj", fail_for_want_of_room)
    with pytest.raises(ClusterError, match="No space left"):
        restore(tmp_path / "whole.tar.gz")


def fail_for_want_of_room(*_, **__) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_empty_home_gives_no_backup(home, tmp_path):
    with pytest.raises(ClusterError, match="nothing to back up"):
        back_up(tmp_path / "all.tar.gz")
    assert not (tmp_path / "all.tar.gz").exists()


def test_a_spoilt_database_is_named_and_no_backup_is_left(filled, tmp_path):
    (filled / "feedback.db").write_bytes(b"SQLite format 3\0 and then nothing of the kind")
    with pytest.raises(ClusterError, match="a database cannot be copied"):
        back_up(tmp_path / "all.tar.gz")
    assert list(tmp_path.glob("*all.tar.gz*")) == []


def rewrite(source: Path, change) -> None:
    """Write an archive anew, with each member as `change` gives it back."""
    with tarfile.open(source) as archive:
        members = [(entry, archive.extractfile(entry).read()) for entry in archive]
    with gzip.open(source, "wb") as squeezed, tarfile.open(fileobj=squeezed, mode="w") as archive:
        for entry, content in change(members):
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def altered(members):
    return [(entry, b"altered" if entry.name.endswith("accepted.jsonl") else content) for entry, content in members]


def missing(members):
    return [member for member in members if not member[0].name.endswith("ray_token")]


def added(members):
    return [*members, (tarfile.TarInfo("home/added"), b"added")]


def twice(members):
    return [members[0], *members]


def outside(members):
    return [(tarfile.TarInfo("home/../../outside"), b"outside"), *members]


def absolute(members):
    return [(tarfile.TarInfo("/outside"), b"outside"), *members]


def linked(members):
    link = tarfile.TarInfo("home/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    return [(link, b""), *members]


def unmarked(members):
    return [member for member in members if member[0].name != "manifest.json"]


def newer(members):
    return [
        (entry, json.dumps({**json.loads(content), "format": 99}).encode() if entry.name == "manifest.json" else content)
        for entry, content in members
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (altered, "not as the manifest says"), (missing, "not as the manifest says"), (added, "not as the manifest says"),
        (twice, "is not what a backup holds"), (outside, "outside"), (absolute, "is not what a backup holds"),
        (linked, "is not what a backup holds"), (unmarked, "manifest is missing"), (newer, "format 99"),
    ],
)  # fmt: skip
def test_an_archive_that_was_tampered_with_changes_nothing(filled, tmp_path, monkeypatch, change, why):
    back_up(tmp_path / "all.tar.gz")
    rewrite(tmp_path / "all.tar.gz", change)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(ClusterError, match=why):
        restore(tmp_path / "all.tar.gz")
    assert not contents(tmp_path / "elsewhere")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
def test_an_archive_that_was_cut_off_changes_nothing(filled, tmp_path, monkeypatch, share):
    back_up(tmp_path / "all.tar.gz")
    whole = (tmp_path / "all.tar.gz").read_bytes()
    (tmp_path / "all.tar.gz").write_bytes(whole[: int(len(whole) * share)])
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(ClusterError, match="no whole backup"):
        restore(tmp_path / "all.tar.gz")
    assert not contents(tmp_path / "elsewhere")


def test_the_command_tells_what_it_did(filled, command, tmp_path, monkeypatch):
    told = command("cluster", "backup", str(tmp_path / "all.tar.gz"))
    assert (told.status, "5 files" in told.out) == (0, True), told.out
    refused = command("cluster", "restore", str(tmp_path / "all.tar.gz"))
    assert (refused.status, "--replace" in refused.err) == (2, True)
    assert "there is no file" in command("cluster", "restore", str(tmp_path / "none")).err
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    assert "python -m cluster up" in command("cluster", "restore", str(tmp_path / "all.tar.gz")).out


def test_what_lies_elsewhere_is_told(filled, command, monkeypatch, tmp_path):
    def told() -> str:
        done = command("cluster", "backup", str(tmp_path / "all.tar.gz"))
        assert done.status == 0, done.err
        return " ".join(done.out.split())

    assert "not in it" not in told()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@mlflow:5000")
    assert "not in it the registry with its adapters, which MLFLOW_TRACKING_URI names elsewhere" in told()
    assert "hidden" not in told()
    (filled / "mlflow").mkdir()
    assert "not in it" not in told(), "a server of its own on this very folder, as in containers"
    monkeypatch.setenv("FEEDBACK_URL", "sqlite:////elsewhere.db")
    assert "not in it feedback, which FEEDBACK_URL names elsewhere" in told()
