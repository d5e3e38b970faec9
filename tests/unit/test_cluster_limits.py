"""What a container may use, by the files of its control group."""

import os
from types import SimpleNamespace

import psutil
import pytest

from cluster import limits

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("150000 100000", 1), ("50000 100000", 1), ("max 100000", ALL), ("", ALL), (None, ALL)],
)
def test_cores_are_those_of_the_group_and_never_more_than_there_are(tmp_path, monkeypatch, text, wanted):
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    if text is not None:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert limits.num_cpus() == wanted


def test_a_group_with_more_cores_than_the_machine_has_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(f"{(os.cpu_count() + 5) * 100000} 100000\n")
    assert limits.num_cpus() == ALL


def test_cores_are_idle_by_how_busy_the_machine_is_and_where_there_is_a_limit_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(os.cpu_count())))
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda: SimpleNamespace(user=25.0, idle=75.0))
    assert limits.num_idle_cores() == 0.75 * (os.cpu_count() or 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    (tmp_path / "cpu.max").write_text("800000 100000\n")
    assert limits.num_idle_cores() == 0


def test_of_the_machines_cores_those_count_that_the_process_is_kept_to(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7})
    assert limits.num_cpus() == 3
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert limits.num_cpus() == 2


@pytest.mark.parametrize(("text", "wanted"), [("1073741824", 2**30), ("max", None), ("9" * 18, None)])
def test_memory_is_that_of_the_group(tmp_path, monkeypatch, text, wanted):
    monkeypatch.setattr(limits, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{text}\n")
    assert limits.memory_bytes() == (wanted or psutil.virtual_memory().total)
