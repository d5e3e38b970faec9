"""What is written is whole or not there."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.home import home_folder, log_folder, new_folder, require_disk, write_text, write_text_once, writing
from configs.errors import ClusterError

pytestmark = pytest.mark.usefixtures("home")


def listed(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_home_and_logs_follow_the_environment(home, tmp_path, monkeypatch):
    assert home_folder() == home
    assert log_folder() == home / "logs"
    monkeypatch.setenv("LOG_DIR", "elsewhere/logs")
    assert log_folder() == tmp_path / "elsewhere" / "logs"
    assert log_folder().is_dir()
    monkeypatch.delenv("TANDEM_HOME")
    assert home_folder() == tmp_path / ".tandem"


@pytest.mark.parametrize(("name", "folder"), [("TANDEM_HOME", home_folder), ("LOG_DIR", log_folder)])
def test_a_place_that_can_be_no_folder_is_named_with_its_setting(name, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(name, "file/folder")
    with pytest.raises(ClusterError, match=rf"(?s)cannot write {tmp_path / 'file' / 'folder'}.*set {name}"):
        folder()


def test_what_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    with (
        pytest.raises(ClusterError, match=rf"(?s)cannot write {tmp_path}.*Is a directory.*another --out"),
        writing(tmp_path, "another --out"),
    ):
        write_text(tmp_path, "text")


def test_a_new_folder_takes_its_place_at_the_end(tmp_path):
    with new_folder(tmp_path / "deep" / "made") as draft:
        (draft / "file").write_text("whole")
        assert not (tmp_path / "deep" / "made").exists()
    assert listed(tmp_path / "deep") == ["made"]
    assert (tmp_path / "deep" / "made" / "file").read_text() == "whole"
    assert (tmp_path / "deep" / "made").stat().st_mode & 0o777 == 0o755


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "here" / "made") as draft:
            (draft / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert listed(tmp_path / "here") == []


def test_a_folder_that_another_made_meanwhile_stays(tmp_path):
    with new_folder(tmp_path / "here" / "made") as slow:
        (slow / "file").write_text("second")
        with new_folder(tmp_path / "here" / "made") as quick:
            (quick / "file").write_text("first")
    assert listed(tmp_path / "here") == ["made"]
    assert (tmp_path / "here" / "made" / "file").read_text() == "first"


def test_a_file_in_the_place_of_a_new_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="made"), new_folder(tmp_path / "made"):
        (tmp_path / "made").write_text("a file")
    assert listed(tmp_path) == ["made"]


def test_a_text_is_written_with_its_mode_whatever_stood_there(tmp_path):
    file = tmp_path / "deep" / "token"
    umask = os.umask(0o077)
    try:
        write_text(file, "open")
        assert file.stat().st_mode & 0o777 == 0o644
        write_text(file, "sécret", mode=0o600)
    finally:
        os.umask(umask)
    assert (file.read_text(encoding="utf-8"), file.stat().st_mode & 0o777) == ("sécret", 0o600)
    assert listed(file.parent) == ["token"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "deep" / "file"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new and longer \ud800")
    assert file.read_text() == "old"
    assert listed(file.parent) == ["file"]


def test_readers_of_a_text_never_see_half_of_it(tmp_path):
    """A reader that opened the old file goes on reading the old text."""
    file = tmp_path / "file"
    write_text(file, "old")
    with file.open() as reader:
        write_text(file, "new")
        assert reader.read() == "old"


def test_of_many_who_write_a_text_once_all_read_the_same(tmp_path):
    file = tmp_path / "deep" / "secret"
    start = threading.Barrier(8)

    def write(number: int) -> str:
        start.wait()
        return write_text_once(file, f"text {number}", mode=0o600)

    with ThreadPoolExecutor(8) as pool:
        read = set(pool.map(write, range(8)))
    assert read == {file.read_text()}
    assert write_text_once(file, "later") == file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert listed(file.parent) == ["secret"]


def test_no_room_on_disk_is_refused_with_figures(home):
    require_disk(0)
    with pytest.raises(ClusterError, match=rf"(?s)no room on disk: [0-9.]+ GiB free under {home}.*1000000.0 GiB are wanted.*TANDEM_HOME"):
        require_disk(1e6)
