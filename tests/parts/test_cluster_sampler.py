"""The machine in the log: the host, and each card by the processes that are its own."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from http.server import ThreadingHTTPServer

import psutil
import pytest

from cluster.cards import Card, Gpu, find_cards
from cluster.gate import INTRODUCTION
from cluster.home import log_folder, write_text
from cluster.join import join
from cluster.logs import SYSTEM, stream_file, streams
from cluster.processes import Process
from cluster.sampler import Sampler, sampler_of
from cluster.session import SAMPLER, Session, keep_session, read_session, token_file
from cluster.versions import read_versions
from configs.errors import ClusterError
from configs.schema import CardConfig, MachineConfig
from tests.helpers.json_door import JsonDoor, listening

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
    file = stream_file(log_folder(), SYSTEM)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def session_of(machine: MachineConfig, *processes: Process, head: str = "") -> Session:
    """A session as `up` would leave it, or `join` where there is a head."""
    addresses = ("127.0.0.1:9", "http://127.0.0.1:9", "http://127.0.0.1:9")
    return Session(processes, (), *addresses, machine=machine.model_dump(mode="json"), head=head)


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


def test_a_card_that_is_gone_ends_no_look_at_the_rest(home):
    gone = MachineConfig(cards=[CardConfig(pool="serve", gpu="97"), CardConfig(pool="train")])
    with pytest.raises(ClusterError):
        find_cards(gone)
    sampler_of(session_of(gone)).sample()
    assert [(line["event"], line["machine"]) for line in lines()] == [("host", "head")]


class Head(JsonDoor):
    """A head, and its dashboard, that knows the one card."""

    def do_GET(self) -> None:
        raylet = {"state": "ALIVE", "labels": {"card": "desk-card0", "machine": "desk"}}
        told = {"ready": True, "versions": read_versions()}
        self.send_json(200, told if self.path == INTRODUCTION else {"data": {"summary": [{"raylet": raylet}]}})


def test_a_joined_machines_cards_are_looked_at_by_a_part_that_the_next_join_begins_again_and_nothing_else(card0):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    sampler = Process(SAMPLER, ended.pid, psutil.Process(ended.pid).create_time())
    ended.wait()
    raylet = replace(card0, name="desk-card0")
    machine = MachineConfig(listen_host="10.0.0.2", name="desk", cards=[CardConfig(pool="train")])
    write_text(token_file(), "t" * 40)
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Head)) as address:
        head = address.removeprefix("http://")
        session = replace(session_of(machine, raylet, sampler, head=head), cards=({"card": "desk-card0"},), dashboard_url=address)
        keep_session(session)
        assert (session.missing(), session.missing_parts()) == ([SAMPLER], [])
        again = join(head, machine, print)
    try:
        assert read_session() == again
        assert again.processes[0] == raylet, "it goes on"
        while len(lines()) < 2:
            assert not again.missing(), (log_folder() / "sampler.log").read_text()
            time.sleep(0.05)
    finally:
        for member in again.processes[1].family():
            member.kill()
    host, card = lines()[:2]
    assert (host["event"], card["event"], card["card"]) == ("host", "card", "desk-card0")
    assert host["machine"] == card["machine"] == "desk"
    assert card["memory_used_gib"] > 0, "what its raylet takes"
