"""What the arbiter shows: chat, who had cards and for how long, the line of jobs, what gates decided, disks; on a real line on disk."""

import json
import shutil
from collections import Counter
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.arbiter import Arbiter, Sight
from cluster.decisions import note_decision, read_decisions
from cluster.exporter import LONGEST_LOOK_S, STALE_S, Exporter, serve_metrics
from cluster.home import home_folder
from cluster.job_queue import FAILED, OTHER_REASON, REASONS, STANDING, NewJob, Queue
from cluster.processes import free_port
from cluster.rule import SERVE, TRAIN, Card, Chat
from configs.errors import ClusterError
from configs.schema import LendingConfig
from tests.helpers.simulated import Setting
from tests.helpers.simulator import Simulation

LOOKED = "tandem_arbiter_looked_timestamp_seconds"
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


def sight(*cards: Card, num_wanted: int = 0, num_answering: int = 0, lost_chat: bool = False) -> Sight:
    return Sight(cards, Chat(num_wanted=num_wanted), None, {}, lost_chat, num_answering)


def job(chatbot: str = "helpdesk") -> NewJob:
    return NewJob("train", chatbot, "name: helpdesk", "/", priority=0, num_cards=1, memory_gib=0.0)


def test_before_the_first_look_nothing_is_shown_but_that_there_was_none_and_the_disks(queue):
    found = shown(Exporter(queue))
    assert found.pop(LOOKED) == 0
    assert found.keys() == {f'tandem_disk_{what}_bytes{{folder="{folder}"}}' for what in ("free", "size") for folder in ("home", "logs")}


def test_disks_are_those_that_tandem_writes_to_and_a_folder_that_is_gone_hides_no_other(queue, tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "elsewhere"))
    exporter = Exporter(queue)
    assert exporter.folders == {"home": home_folder(), "logs": tmp_path / "elsewhere"}
    found = shown(exporter)
    assert found['tandem_disk_size_bytes{folder="logs"}'] == shutil.disk_usage(tmp_path).total
    (tmp_path / "elsewhere").rmdir()
    found = shown(exporter)
    assert 'tandem_disk_free_bytes{folder="home"}' in found
    assert 'tandem_disk_free_bytes{folder="logs"}' not in found


def test_chat_is_wanted_by_its_requests_and_bounds_and_where_all_of_it_was_lost(queue):
    exporter = Exporter(queue)
    for seen, wanted, answering in (
        (sight(num_wanted=2, num_answering=1), 2, 1),
        (sight(), 0, 0),
        (sight(lost_chat=True), 1, 0),
    ):
        exporter.note(seen, 100.0)
        found = shown(exporter)
        assert (found["tandem_engines_wanted"], found["tandem_engines_answering"]) == (wanted, answering)


def test_what_was_seen_is_forgotten_when_nothing_is_seen_for_long_and_seconds_go_on_afterwards(queue):
    exporter = Exporter(queue)
    exporter.note(sight(*CARDS), 100.0)
    exporter.note(sight(*CARDS), 110.0)
    exporter.miss(110.0 + STALE_S)
    assert 'tandem_card_up{card="card0",pool="serve"}' in shown(exporter), "one look in vain says nothing"
    exporter.miss(111.0 + STALE_S)
    found = shown(exporter)
    assert found[LOOKED] == 110
    assert not any(name.startswith("tandem_card") for name in found)
    exporter.note(sight(*CARDS), 500.0)
    busy_s = shown(exporter)['tandem_card_busy_seconds_total{card="card0",holder="chat",pool="serve"}']
    assert busy_s == 10 + LONGEST_LOOK_S


def test_what_was_seen_is_shown_also_where_nothing_can_be_done_about_it(queue):
    class Ground:
        """Stands where the cluster stands: chat is lost, and cannot be deployed again."""

        def look(self) -> Sight:
            return sight(*CARDS, lost_chat=True)

        def restore_chat(self) -> None:
            raise ClusterError("Ray Serve refused it", "a test", "none")

    exporter = Exporter(queue)
    with pytest.raises(ClusterError):
        Arbiter(queue, Ground(), LendingConfig()).step(100.0, exporter.note)
    found = shown(exporter)
    assert (found[LOOKED], found["tandem_engines_wanted"], found["tandem_engines_answering"]) == (100, 1, 0)


def test_a_card_that_is_no_more_is_shown_no_more(queue):
    """On Kubernetes each pod's card has a name of its own: what is shown would grow with each pod that ever was."""
    exporter = Exporter(queue)
    for number in range(3):
        begun = queue.submit(job(), 100.0)
        queue.begin(begun.id, (f"pod{number}",), "it is its turn", 100.0)
        exporter.note(sight(Card(f"pod{number}", TRAIN)), 100.0 + 10 * number)
    found = shown(exporter)
    assert {name for name in found if "pod0" in name or "pod1" in name} == set()
    assert found['tandem_handovers_total{card="pod2",reason="its turn"}'] == 1
    assert exporter.busy_s.keys() == {("pod2", "train", holder) for holder in ("chat", "train", "sweep", "other")}


def test_seconds_go_to_who_has_the_card(queue):
    exporter = Exporter(queue)
    first, second = queue.submit(job(), 100.0), queue.submit(job(), 100.0)
    exporter.note(sight(*CARDS), 100.0)
    queue.begin(first.id, ("card1",), "it is its turn", 100.0)
    exporter.note(sight(*CARDS), 110.0)
    found = shown(exporter)
    assert found['tandem_card_busy_seconds_total{card="card0",holder="chat",pool="serve"}'] == 10
    assert found['tandem_card_busy_seconds_total{card="card1",holder="train",pool="train"}'] == 10
    assert sum(seconds for name, seconds in found.items() if name.startswith("tandem_card_busy")) == 20
    assert not any(seconds for name, seconds in found.items() if name.startswith("tandem_card_lent"))
    assert (found['tandem_card_up{card="card0",pool="serve"}'], found['tandem_card_up{card="card2",pool="train"}']) == (1, 0)
    assert found['tandem_jobs{kind="train",state="running"}'] == found['tandem_jobs{kind="train",state="waiting"}'] == 1
    assert found['tandem_jobs{kind="sweep",state="waiting"}'] == 0
    assert found["tandem_job_waiting_seconds"] == 10
    assert found['tandem_handovers_total{card="card1",reason="its turn"}'] == 1

    queue.lose(first.id, "killed", 3, 120.0)
    queue.begin(second.id, ("card0",), "lent by chat", 120.0)
    exporter.note(sight(Card("card0", SERVE), Card("card1", TRAIN, engine_since_s=111.0)), 130.0)
    found = shown(exporter)
    assert found['tandem_card_lent_seconds_total{card="card0",pool="serve"}'] == 20
    assert found['tandem_card_lent_seconds_total{card="card1",pool="train"}'] == 20
    assert found["tandem_job_losses_total"] == 1


def test_a_run_in_no_line_is_somebody_too_and_an_outage_is_nobodys(queue):
    exporter = Exporter(queue)
    exporter.note(sight(Card("card1", TRAIN, is_foreign=True)), 0.0)
    exporter.note(sight(Card("card1", TRAIN, is_foreign=True)), 10_000.0)
    exporter.note(sight(Card("card1", TRAIN, is_foreign=True)), 9_000.0)  # the clock was put back
    found = shown(exporter)
    assert found['tandem_card_busy_seconds_total{card="card1",holder="other",pool="train"}'] == LONGEST_LOOK_S


def test_decisions_are_counted_and_dated(queue):
    exporter = Exporter(queue)
    exporter.note(sight(*CARDS), 100.0)
    assert not any(name.startswith("tandem_gate") for name in shown(exporter))
    for decision in ("passed", "failed", "failed"):
        note_decision("helpdesk", "helpdesk:2", decision)
    exporter.note(sight(*CARDS), 101.0)
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
    exporter.note(sight(*CARDS), 1.0)
    assert 'tandem_gate_decisions_total{chatbot="helpdesk",decision="failed"}' in shown(exporter)


def test_metrics_are_shown_at_the_port_that_is_named_and_else_at_any(queue, home):
    exporter, port = Exporter(queue), free_port()
    exporter.note(sight(*CARDS), 1.0)
    for wanted in (port, 0):
        serve_metrics(exporter, "127.0.0.1", wanted, Path("/tmp/ray"))
        (told,) = json.loads((home / "monitoring" / "arbiter.json").read_text())
        (target,) = told["targets"]
        assert target != "127.0.0.1:0"
        assert wanted in (0, int(target.rpartition(":")[2]))
        assert b"tandem_card_up" in urlopen(f"http://{target}/metrics").read()


def test_reasons_of_handovers_are_few():
    """All that the rule and the arbiter say has its place, whatever happens in a cluster where much does."""
    lending = LendingConfig(enabled=True, quiet_after_s=3, min_hold_s=5)
    counted: Counter[str] = Counter()
    for can_sleep in (True, False):
        simulation = Simulation(
            Setting(num_serve=1, num_train=2, max_engines=2, uses_train_cards=True, can_sleep=can_sleep, lending=lending)
        )
        for number in range(40):
            simulation.submit_job("sweep" if number % 3 else "train", 30, number % 2, 1, 0, 32 * (number % 4 == 0))
            simulation.run(15)
            simulation.rush(100 if number % 2 else 9000, number % 7)
            if number % 8 == 5:
                simulation.kill_run()
            if number % 16 == 9:
                simulation.kill_head(5)
            if number % 16 == 11:
                simulation.queue.cancel(simulation.queue.jobs(*STANDING)[0].id, simulation.now_s)
        simulation.run(900)
        counted += Counter({reason: number for (_, reason), number in simulation.queue.count_handovers().items()})
    assert OTHER_REASON not in counted, list(simulation.queue.handovers(9999))
    assert set(counted) <= set(REASONS.values())
    assert len(counted) >= 9, counted


@pytest.mark.parametrize("said", ["error: the actor was lost", "error: no such file"])
def test_what_a_process_says_as_it_fails_is_no_reason_of_its_own(queue, said):
    begun = queue.submit(job(), 100.0)
    queue.begin(begun.id, ("card1",), "it is its turn", 100.0)
    queue.end(begun.id, FAILED, said, 101.0)
    assert queue.count_handovers() == {("card1", "its turn"): 1, ("card1", "failed"): 1}
