"""What a machine checks before it joins: address, name, code; and what is refused on one that did."""

import socket
import subprocess
import sys
from dataclasses import replace
from http.server import ThreadingHTTPServer

import psutil
import pytest

from cluster.activity import Activity, note_quiet, read_activity
from cluster.arbiter import GONE_S, Arbiter, Driver, Sight
from cluster.home import write_text
from cluster.job_queue import NewJob, Queue
from cluster.join import ask_head, head_gate, host_name, join, joined_parts, own_address, own_cards
from cluster.kuberay import START_COMMAND
from cluster.machines import remember, with_lost
from cluster.parts import RAY_START, parts_of, stack_environment
from cluster.processes import free_port
from cluster.rule import Card, Chat
from cluster.session import ARBITER, SAMPLER, Session, joined_cards, keep_session, known_cards, read_session, require_session
from cluster.stack import bring_token, start
from cluster.versions import CHANGED, git_commit, read_versions, require_alike
from configs.errors import ClusterError, ConfigError
from configs.loader import ROOT, load_machine
from configs.schema import LendingConfig, MachineConfig
from tests.helpers.json_door import JsonDoor, listening

pytestmark = pytest.mark.usefixtures("home")
TOKEN = "t" * 40


@pytest.fixture
def joined(up):
    session = replace(up(), head="10.0.0.1:5000", machine={**MachineConfig().model_dump(mode="json"), "name": "desk"})
    keep_session(session)
    return session


def raylet(machine: str, card: str, state: str = "ALIVE") -> dict:
    return {"state": state, "nodeId": card, "labels": {"machine": machine, "card": card, "pool": "train", "ray.io/node-id": card}}


@pytest.mark.parametrize(("given", "gate"), [("box", "box:5000"), ("10.0.0.1", "10.0.0.1:5000"), ("box:7000", "box:7000")])
def test_the_heads_gate_is_at_the_usual_port_unless_another_is_named(given, gate):
    assert head_gate(given) == gate
    assert head_gate(given, 5001) == gate.replace(":5000", ":5001")


@pytest.mark.parametrize("given", ["box:port", "http://box", "box:99999", "desk.yaml", "", "[::1", "box..here", "b" * 70])
def test_what_is_no_address_is_refused(given):
    with pytest.raises(ClusterError, match="is no address"):
        head_gate(given)


def test_a_machines_cards_have_its_name_and_labels_say_which_it_is():
    cards = own_cards(MachineConfig(name="desk"))
    assert [(card.name, card.machine) for card in cards] == [("desk-card0", "desk"), ("desk-card1", "desk")]
    assert host_name().replace("-", "").isalnum()


def test_a_machine_that_joins_may_bring_one_pool_and_one_alone_may_not():
    assert load_machine("auto", ["listen_host=10.0.0.2", "cards=[{pool: serve}]"]).cards[0].pool == "serve"
    for settings in (["cards=[{pool: serve}]"], ["cards=[]"], ["listen_host=0.0.0.0"], ["storage=shared"]):
        with pytest.raises(ConfigError):
            load_machine("auto", settings)


def test_other_code_than_the_heads_is_refused_with_every_difference():
    here = read_versions()
    require_alike(here, here)
    require_alike({**here, "commit": "unknown"}, here)
    with pytest.raises(ClusterError, match="other code") as refused:
        require_alike({**here, "ray": "1.0", "commit": "abc"}, here)
    assert refused.value.why.splitlines() == [f"  commit: abc there, {here['commit']} here", f"  ray: 1.0 there, {here['ray']} here"]


@pytest.mark.parametrize(
    ("of_head", "ready", "told"),
    [
        ({}, True, ""),
        ({"commit": f"{git_commit().removesuffix(CHANGED)}{CHANGED}"}, True, ""),
        ({"commit": "abc", "ray": "1.0"}, True, "this machine has other code than the head\n  commit: abc there, "),
        ({}, False, "the head is not up yet"),
    ],
    ids=["as it was", "a file was edited", "upgraded", "still starting"],
)
def test_a_card_that_comes_back_is_held_against_the_head_again(of_head, ready, told, home):
    write_text(home / "ray_token", TOKEN)

    class Head(JsonDoor):
        def do_GET(self) -> None:
            self.send_json(200, {"ready": ready, "versions": {**read_versions(), **of_head}})

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Head)) as address:
        session = Session((), (), "127.0.0.1:9", "http://127.0.0.1:9", "http://127.0.0.1:9", head=address.removeprefix("http://"))
        (name, command, _), *beside = joined_parts(
            session, MachineConfig(), own_cards(MachineConfig(name="desk"))[:1], {"mlflow_url": None}
        )
        assert [part for part, *_ in beside] == [SAMPLER], "what looks at them, when they are there"
        assert (name, command[4 : 4 + len(RAY_START)]) == ("desk-card0", RAY_START)
        instead = [*command[:4], sys.executable, "-c", "print('begun')"]
        ended = subprocess.run(instead, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == ((2, "") if told else (0, "begun\n"))
    assert ended.stderr.startswith(f"error: {told}" if told else "")
    assert "Traceback" not in ended.stderr


def test_without_a_token_nobody_joins_and_one_in_the_environment_is_kept(home, monkeypatch):
    with pytest.raises(ClusterError, match="does not have the cluster's token"):
        bring_token()
    monkeypatch.setenv("TANDEM_TOKEN", "short")
    with pytest.raises(ClusterError, match="no good token"):
        bring_token()
    monkeypatch.setenv("TANDEM_TOKEN", TOKEN)
    bring_token()
    assert (home / "ray_token").read_text() == TOKEN
    assert (home / "ray_token").stat().st_mode & 0o077 == 0
    monkeypatch.delenv("TANDEM_TOKEN")
    bring_token(make=True)
    assert (home / "ray_token").read_text() == TOKEN, "one that is there stays"


def test_a_head_that_does_not_answer_is_told_with_how_to_start_one(home):
    with pytest.raises(ClusterError, match="no head answers") as refused:
        ask_head(f"127.0.0.1:{free_port()}")
    assert "listen_host=ITS_ADDRESS" in refused.value.remedy


@pytest.mark.parametrize("told", [[], "hello", {"error": "no such page"}, None])
def test_what_answers_and_is_no_head_is_told(home, told):
    class Other(JsonDoor):
        def do_GET(self) -> None:
            self.send_json(404, told)

    with (
        listening(ThreadingHTTPServer(("127.0.0.1", 0), Other)) as address,
        pytest.raises(ClusterError, match="is no head"),
    ):
        ask_head(address.removeprefix("http://"))


def test_the_way_to_the_head_tells_this_machines_address():
    assert own_address("127.0.0.1:5000") == "127.0.0.1"


def test_a_head_joins_nobody_and_a_joined_machine_is_no_head(up, joined, command):
    with pytest.raises(ClusterError, match="this machine joined the cluster of"):
        start(MachineConfig(), print)
    assert require_session(only_head=False) == joined
    with pytest.raises(ClusterError, match="done on the cluster's head") as refused:
        require_session()
    assert refused.value.remedy == "the same command on 10.0.0.1"
    for words in (["queue"], ["cancel", "1"], ["move", "1", "--priority", "2"], ["submit", "configs/helpdesk.yaml"]):
        assert "done on the cluster's head" in command("cluster", *words).err
    session = up()
    with pytest.raises(ClusterError, match="is the head of a cluster"):
        join("10.0.0.1:5000", MachineConfig(), print)
    assert read_session() == session


def test_mlflow_stays_on_loopback_and_a_gate_stands_where_machines_may_join(up):
    commands = {name: command for name, command, _ in parts_of(MachineConfig(), [], up())}
    assert "gate" not in commands
    commands = {name: command for name, command, _ in parts_of(MachineConfig(listen_host="10.0.0.1"), [], up())}
    assert commands["mlflow"][commands["mlflow"].index("--host") + 1] == "127.0.0.1"
    assert commands["gate"][3:] == ["10.0.0.1", "5000", "http://127.0.0.1:9", "door"]
    assert (ARBITER in commands, SAMPLER in commands) == (True, False), "the arbiter looks at the head, and nobody does so twice"


def test_cards_of_joined_machines_count_while_they_are_there():
    raylets = [raylet("desk", "desk-card0"), raylet("head", "card0"), raylet("attic", "attic-card0", "DEAD"), {"state": "ALIVE"}]
    assert joined_cards(raylets) == ({"machine": "desk", "card": "desk-card0", "pool": "train"},)
    assert [card["card"] for card in known_cards(raylets)] == ["card0", "attic-card0", "desk-card0"]


def test_workers_of_one_run_talk_over_the_interface_of_the_machines_address():
    assert "GLOO_SOCKET_IFNAME" not in stack_environment(MachineConfig())
    others = [entry.address for found in psutil.net_if_addrs().values() for entry in found if entry.family == socket.AF_INET]
    for address in (address for address in others if not address.startswith("127.")):
        interface = stack_environment(MachineConfig(listen_host=address))["GLOO_SOCKET_IFNAME"]
        assert address in [entry.address for entry in psutil.net_if_addrs()[interface]]


def test_a_job_leaves_a_card_that_is_gone_with_its_machine_and_stands_in_line_again():
    class Ground:
        """Stands where the cluster stands: one card that goes, and a driver that waits for it."""

        def __init__(self) -> None:
            self.driver, self.is_gone, self.stopped = Driver("alive"), False, []

        def look(self) -> Sight:
            cards = () if self.is_gone else (Card("desk-card0", "train"),)
            drivers = {job.submission: self.driver for job in queue.jobs() if job.is_submitted}
            return Sight(cards, Chat(), None, drivers)

        def submit(self, job) -> None:
            """Ray took it."""

        def stop(self, submission) -> None:
            self.stopped.append(submission)

    with Queue(":memory:") as queue:
        ground = Ground()
        arbiter = Arbiter(queue, ground, LendingConfig())
        job = queue.submit(NewJob("train", "bot", ""), now_s=0.0)
        arbiter.step(1.0)
        assert queue.find(job.id).cards == ("desk-card0",)
        ground.is_gone = True
        arbiter.step(10.0)
        arbiter.step(10.0 + GONE_S)
        assert queue.find(job.id).state == "running", "what was killed there may be back at once"
        arbiter.step(11.0 + GONE_S)
        assert ground.stopped
        assert queue.find(job.id).reason == "desk-card0 is gone with the machine"
        ground.driver = Driver("stopped")
        arbiter.step(20.0 + GONE_S)
        assert queue.find(job.id).state == "waiting"
        ground.is_gone = False
        arbiter.step(30.0 + GONE_S)
        again = queue.find(job.id)
        assert (again.state, again.cards, again.num_lost) == ("running", ("desk-card0",), 0)


def test_a_machine_that_was_lost_is_remembered_and_one_that_left_is_not(home):
    """Ray tells of dead raylets as this: by number and reason alone, as it was seen."""
    dead = {"state": "DEAD", "labels": {}, "nodeManagerAddress": ""}
    remember([raylet("head", "card0"), raylet("desk", "desk-card0"), raylet("attic", "attic-card0")])
    lost = {**dead, "nodeId": "desk-card0", "deathInfo": {"reason": "UNEXPECTED_TERMINATION"}}
    left = {**dead, "nodeId": "attic-card0", "deathInfo": {"reason": "EXPECTED_TERMINATION"}}
    there = raylet("head", "card0")
    assert [(found["labels"]["card"], found["state"]) for found in with_lost([there, lost, left])] == [
        ("card0", "ALIVE"),
        ("desk-card0", "DEAD"),
    ]
    assert with_lost([there]) == [there], "a head that was started anew never had them"
    back = {**raylet("desk", "desk-card0"), "nodeId": "another"}
    assert with_lost([there, lost, back]) == [there, back]


def test_a_pod_that_was_lost_is_missed_by_nobody(home, monkeypatch):
    monkeypatch.setenv(START_COMMAND, "ray start --head")
    remember([raylet("head", "card0"), raylet("serve-x7k2", "serve-x7k2-card0")])
    lost = {"state": "DEAD", "labels": {}, "nodeId": "serve-x7k2-card0", "deathInfo": {"reason": "UNEXPECTED_TERMINATION"}}
    assert with_lost([raylet("head", "card0"), lost]) == [raylet("head", "card0")]


def test_an_engine_elsewhere_is_quiet_as_long_as_it_said(home):
    assert read_activity(7, "node") == Activity()
    note_quiet("node", 7, 30.0)
    assert 30 <= read_activity(7, "node").quiet_s < 40
    note_quiet("node", 7, 0.0)
    assert read_activity(7, "node").quiet_s < 10
    assert read_activity(7).quiet_s == 0, "another engine has the same number here"
