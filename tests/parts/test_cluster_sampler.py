"""The machine in the log: the host, and each card by the processes that are its own."""

import json
import subprocess
import sys

import psutil
import pytest

from cluster.cards import Card, Gpu
from cluster.home import log_folder
from cluster.logs import SYSTEM, stream_file, streams
from cluster.processes import Process
from cluster.sampler import Sampler

BUSY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(2**26)\\nwhile True: pass'])"


@pytest.fixture
def card0(home):
    """A process that leads a session, as `up` starts them, with a child that is at work."""
    child = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    leader = psutil.Process(child.pid)
    yield Process("card0", child.pid, leader.create_time())
    for member in [*leader.children(recursive=True), leader]:
        member.kill()
    child.wait()


def lines() -> list[dict]:
    return [json.loads(line) for line in stream_file(log_folder(), SYSTEM).read_text().splitlines()]


def test_host_and_cards_have_a_line_each_and_a_card_what_its_processes_take(card0):
    cards = [Card("card0", "serve", 1, 12.0), Card("card1", "train", 1, 12.0)]
    sampler = Sampler(streams().logger(SYSTEM), cards, (card0,), every_s=0.0)
    while True:
        sampler.sample()
        host, first, second = lines()[-3:]
        if first["use"] > 0 and first["memory_used_gib"] >= 0.06:
            break
    assert host["event"] == "host"
    assert 0 < host["memory_used_gib"] < host["memory_gib"]
    assert host["disk_free_gib"] > 0
    assert (first["event"], first["card"], first["pool"], first["accelerator"], first["memory_gib"]) == (
        "card",
        "card0",
        "serve",
        "cpu",
        12,
    )
    assert (second["card"], second["use"], second["memory_used_gib"]) == ("card1", 0, 0)


def test_a_look_comes_only_every_so_often(home):
    sampler = Sampler(streams().logger(SYSTEM), [], (), every_s=3600)
    for _ in range(3):
        sampler.sample()
    assert [line["event"] for line in lines()] == ["host"]


def test_a_gpu_of_which_nothing_can_be_learnt_has_a_line_all_the_same(home):
    gpu = Gpu("99", "NVIDIA None", 24, 24, "1", 9.0)
    sampler = Sampler(streams().logger(SYSTEM), [Card("card0", "serve", 1, 24, gpu)], (), every_s=0.0)
    sampler.sample()
    assert (lines()[-1]["card"], lines()[-1]["accelerator"]) == ("card0", "NVIDIA-None")
