"""What the arbiter shows: who had cards and for how long, the line of jobs, and what gates decided; on a real line on disk."""

import json
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.decisions import note_decision, read_decisions
from cluster.exporter import LONGEST_LOOK_S, Exporter, serve_metrics
from cluster.job_queue import NewJob, Queue
from cluster.processes import free_port
from cluster.rule import SERVE, TRAIN, Card

CARDS = (Card("card0", SERVE, engine_since_s=5.0), Card("card1", TRAIN), Card("card2", TRAIN, is_alive=False))


@pytest.fixture
def queue(home):
    with Queue() as queue:
        yield queue


def shown(exporter: Exporter) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(exporter)
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def job(chatbot: str = "helpdesk") -> NewJob:
    return NewJob("train", chatbot, "name: helpdesk", "/", priority=0, num_cards=1, memory_gib=0.0)


def test_nothing_is_shown_before_the_first_look(queue):
    assert shown(Exporter(queue)) == {}


def test_seconds_go_to_who_has_the_card(queue):
    exporter = Exporter(queue)
    first, second = queue.submit(job(), 100.0), queue.submit(job(), 100.0)
    exporter.note(CARDS, 100.0)
    queue.begin(first.id, ("card1",), "its turn", 100.0)
    exporter.note(CARDS, 110.0)
    found = shown(exporter)
    assert found['tandem_card_busy_seconds_total{card="card0",holder="chat",pool="serve"}'] == 10
    assert found['tandem_card_busy_seconds_total{card="card1",holder="train",pool="train"}'] == 10
    assert sum(seconds for name, seconds in found.items() if name.startswith("tandem_card_busy")) == 20
    assert not any(seconds for name, seconds in found.items() if name.startswith("tandem_card_lent"))
    assert (found['tandem_card_up{card="card0",pool="serve"}'], found['tandem_card_up{card="card2",pool="train"}']) == (1, 0)
    assert found['tandem_jobs{kind="train",state="running"}'] == found['tandem_jobs{kind="train",state="waiting"}'] == 1
    assert found['tandem_jobs{kind="sweep",state="waiting"}'] == 0
    assert found["tandem_job_waiting_seconds"] == 10
    assert found['tandem_handovers_total{card="card1"}'] == 1

    queue.lose(first.id, "killed", 3, 120.0)
    queue.begin(second.id, ("card0",), "lent by chat", 120.0)
    exporter.note((Card("card0", SERVE), Card("card1", TRAIN, engine_since_s=111.0)), 130.0)
    found = shown(exporter)
    assert found['tandem_card_lent_seconds_total{card="card0",pool="serve"}'] == 20
    assert found['tandem_card_lent_seconds_total{card="card1",pool="train"}'] == 20
    assert found["tandem_job_losses_total"] == 1


def test_a_run_in_no_line_is_somebody_too_and_an_outage_is_nobodys(queue):
    exporter = Exporter(queue)
    exporter.note((Card("card1", TRAIN, is_foreign=True),), 0.0)
    exporter.note((Card("card1", TRAIN, is_foreign=True),), 10_000.0)
    exporter.note((Card("card1", TRAIN, is_foreign=True),), 9_000.0)  # the clock was put back
    found = shown(exporter)
    assert found['tandem_card_busy_seconds_total{card="card1",holder="other",pool="train"}'] == LONGEST_LOOK_S


def test_decisions_are_counted_and_dated(queue):
    exporter = Exporter(queue)
    exporter.note(CARDS, 100.0)
    assert not any(name.startswith("tandem_gate") for name in shown(exporter))
    for decision in ("passed", "failed", "failed"):
        note_decision("helpdesk", "helpdesk:2", decision)
    exporter.note(CARDS, 101.0)
    found = shown(exporter)
    assert found['tandem_gate_decisions_total{chatbot="helpdesk",decision="failed"}'] == 2
    assert found['tandem_gate_decisions_total{chatbot="helpdesk",decision="passed"}'] == 1
    newest = read_decisions()[-1]
    assert newest.version == "helpdesk:2"
    assert found['tandem_gate_decided_timestamp_seconds{chatbot="helpdesk",decision="failed"}'] == newest.at_s


def test_a_decision_that_cannot_be_read_ends_no_arbiter(queue, home):
    note_decision("helpdesk", "helpdesk:1", "passed")
    with (home / "gate.jsonl").open("ab") as file:
        file.write(b'{"at_s": 1.0, "chat\n[1]\n{"at_s": 1.0, "of": "another Tandem"}\n\xff\n')
    note_decision("helpdesk", "helpdesk:2", "failed")
    assert [entry.decision for entry in read_decisions()] == ["passed", "failed"]
    exporter = Exporter(queue)
    exporter.note(CARDS, 1.0)
    assert 'tandem_gate_decisions_total{chatbot="helpdesk",decision="failed"}' in shown(exporter)


def test_metrics_are_shown_at_the_port_that_is_named_and_else_at_any(queue, home):
    exporter, port = Exporter(queue), free_port()
    exporter.note(CARDS, 1.0)
    for wanted in (port, 0):
        serve_metrics(exporter, "127.0.0.1", wanted, Path("/tmp/ray"))
        (told,) = json.loads((home / "monitoring" / "arbiter.json").read_text())
        (target,) = told["targets"]
        assert target != "127.0.0.1:0"
        assert wanted in (0, int(target.rpartition(":")[2]))
        assert b"tandem_card_up" in urlopen(f"http://{target}/metrics").read()
