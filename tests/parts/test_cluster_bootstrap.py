"""The set-up of `.venv`, as far as it goes without a network."""

import pytest

from cluster import bootstrap


@pytest.fixture
def venv(tmp_path, monkeypatch):
    """A `.venv` that was made from another lock, and a pip that finds no packages."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "made-from", "left-by-an-older-lock"):
        (tmp_path / ".venv" / name).write_text("old")
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / ".venv"


def test_a_venv_of_another_lock_is_made_afresh_and_a_failure_has_a_remedy(venv, capfd):
    assert not bootstrap.is_done(bootstrap.choose_lock())
    assert bootstrap.main() == bootstrap.EXIT_BAD_INPUT
    assert not (venv / "left-by-an-older-lock").exists()
    assert not bootstrap.is_done(bootstrap.choose_lock()), "a set-up that failed is not taken for done"
    shown = capfd.readouterr().err
    assert "error: set-up failed" in shown
    assert "-venv" in shown
    assert "Traceback" not in shown


def test_a_venv_of_this_very_lock_is_left_alone(venv):
    bootstrap.stamp_file().write_text(bootstrap.stamp(bootstrap.choose_lock()))
    assert bootstrap.main() == 0
    assert (venv / "left-by-an-older-lock").exists()


def test_a_folder_of_somebody_elses_is_not_wiped(venv, capfd):
    bootstrap.stamp_file().unlink()
    assert bootstrap.main() == bootstrap.EXIT_BAD_INPUT
    assert (venv / "left-by-an-older-lock").exists()
    assert "not made by make setup" in capfd.readouterr().err
