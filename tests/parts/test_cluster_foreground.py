"""A part in the foreground, in a process of its own: its standard output has what the machine's other processes log."""

import json
import os
import subprocess
import sys

import pytest

from cluster.logs import API, SYSTEM, streams
from cluster.processes import free_port
from configs.loader import ROOT

SECRET = "a-judge-key-that-no-log-may-have"


@pytest.fixture
def waiting(home, monkeypatch):
    """A machine with cards that waits for its head."""
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    command = [sys.executable, "-u", "-m", "cluster", "run", "card", f"127.0.0.1:{free_port()}", "listen_host=127.0.0.1"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)
    assert "waiting for the head" in process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_containers_log_has_the_events_of_all_that_run_in_it_and_no_secret(waiting):
    streams().logger(SYSTEM).info("card", card="card0", said=SECRET)
    streams().logger(API).info("request", route="/v1/models")
    events = []
    while len(events) < 2:
        line = waiting.stdout.readline()
        assert line, "it ended"
        assert SECRET not in line
        events += [json.loads(line)] if line.startswith("{") else []
    assert {(event["stream"], event["event"]) for event in events} == {(SYSTEM, "card"), (API, "request")}
    streams().logger(SYSTEM).info("last")
    waiting.terminate()
    rest, _ = waiting.communicate(timeout=60)
    assert json.loads(rest.splitlines()[-1])["event"] == "last", "and what came before it ended"
    assert waiting.returncode == 0
