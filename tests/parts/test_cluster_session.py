"""Ports, processes and the session file; `up` that is refused leaves nothing, and without `up` every door says so."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import psutil
import pytest

from cluster.cards import Card, find_cards
from cluster.home import write_text
from cluster.parts import head_name, parts_of
from cluster.processes import Process, port_owner
from cluster.session import ARBITER, Session, answers, read_session, require_session, token_file, write_exports
from cluster.stack import _require_free_ports, spawn, start, stop
from configs.errors import ClusterError
from configs.loader import ROOT
from configs.schema import MachineConfig
from tests.unit.test_cluster_cards import LARGE, SMALL

pytestmark = pytest.mark.usefixtures("home")


def me() -> str:
    """Return how this process is named; xdist gives its workers another name for each test."""
    return f"{psutil.Process().name()} (process {os.getpid()})"


def own_start() -> float:
    return psutil.Process().create_time()


def session_of(*processes: Process) -> Session:
    cards = ({"card": "card0", "pool": "serve"}, {"card": "card1", "pool": "train"})
    return Session(processes, cards, "127.0.0.1:6379", "http://127.0.0.1:8265", "http://127.0.0.1:5000")


def keep(home, session: Session) -> None:
    """Write the session as `up` does."""
    write_text(home / "cluster.json", json.dumps(asdict(session), indent=2))


def ended_child() -> Process:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = Process("card0", child.pid, psutil.Process(child.pid).create_time())
    child.wait()
    return process


@contextmanager
def listener(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.bind((host, 0))
        door.listen()
        yield door.getsockname()[1]


def free_ports(count: int) -> list[int]:
    """Find ports of which no two are the same."""
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.socket()) for _ in range(count)]
        for door in doors:
            door.bind(("127.0.0.1", 0))
        return [door.getsockname()[1] for door in doors]


def test_the_owner_of_a_port_is_named():
    with listener() as port:
        assert port_owner("127.0.0.1", port) == me()
        assert port_owner("0.0.0.0", port) == me()
    assert port_owner("127.0.0.1", port) is None


def test_a_port_that_is_held_on_all_addresses_is_held_on_each():
    with listener("0.0.0.0") as port:
        assert port_owner("127.0.0.1", port) == me()


def test_a_port_just_left_is_free():
    """The side that ends a connection keeps its port in TIME_WAIT; a server may listen there all the same."""
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = door.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            door.accept()[0].close()
            assert client.recv(1) == b""
    assert port_owner("127.0.0.1", port) is None


def test_an_address_that_is_not_of_this_machine_is_not_a_taken_port():
    with pytest.raises(ClusterError) as refused:
        _require_free_ports(MachineConfig(listen_host="192.0.2.1"))  # an address for examples, that no machine has
    assert "192.0.2.1" in str(refused.value)
    assert "held by" not in str(refused.value)


def test_up_on_a_taken_port_ends_with_status_2_and_leaves_nothing(home, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ray, mlflow = free_ports(2)
    with listener() as dashboard:
        words = [f"ray_port={ray}", f"dashboard_port={dashboard}", f"mlflow_port={mlflow}", "min_disk_free_gib=0"]
        ended = subprocess.run(
            [sys.executable, "-m", "cluster", "up", "auto", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert f"error: a port is taken\n  port {dashboard} (dashboard_port) is held by {me()}\n" in ended.stderr
    assert f"python -m cluster up auto dashboard_port={dashboard + 1}" in ended.stderr
    assert sorted(file.name for file in home.rglob("*")) == ["cluster.lock"]


def test_every_taken_port_is_named():
    [dashboard] = free_ports(1)
    with listener() as ray, listener() as mlflow, pytest.raises(ClusterError, match="a port is taken") as refused:
        _require_free_ports(MachineConfig(ray_port=ray, dashboard_port=dashboard, mlflow_port=mlflow))
    assert refused.value.why.splitlines() == [
        f"  port {ray} (ray_port) is held by {me()}",
        f"  port {mlflow} (mlflow_port) is held by {me()}",
    ]


def test_the_remedy_of_a_taken_port_names_the_machine_that_was_asked_for():
    ray, dashboard = free_ports(2)
    with listener() as mlflow, pytest.raises(ClusterError) as refused:
        _require_free_ports(MachineConfig(ray_port=ray, dashboard_port=dashboard, mlflow_port=mlflow), "my desk.yaml")
    assert refused.value.remedy.endswith(f"python -m cluster up 'my desk.yaml' mlflow_port={mlflow + 1}")


def test_the_port_of_mlflow_does_not_matter_where_another_server_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    ray, dashboard = free_ports(2)
    with listener() as mlflow:
        _require_free_ports(MachineConfig(ray_port=ray, dashboard_port=dashboard, mlflow_port=mlflow))


def test_up_without_room_on_disk_is_refused():
    with pytest.raises(ClusterError, match="no room on disk"):
        start(MachineConfig(min_disk_free_gib=1e9), print)


def test_the_session_file_comes_back_as_it_was(home):
    assert read_session() is None
    session = session_of(Process("mlflow", os.getpid(), own_start()), Process("card0", os.getpid(), own_start()))
    keep(home, session)
    assert read_session() == session
    assert require_session() == session


SPOILT = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "no text": lambda whole: b"\xff\xfe\x00",
    "a list": lambda whole: b"[]",
    "null": lambda whole: b"null",
    "other fields": lambda whole: b'{"processes": [], "pid": 7}',
    "a process that is none": lambda whole: whole.replace(b'"pid": 999999', b'"pid": "card0"'),
    "cards that are none": lambda whole: whole.replace(b'"cards": [', b'"cards": [7, '),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_session_file_that_is_spoilt_is_one_clear_error_everywhere_and_down_forgets_it(spoil, home, command):
    keep(home, session_of(Process("card0", 999999, 1.0)))
    file = home / "cluster.json"
    file.write_bytes(spoil(file.read_bytes()))
    for words in (["up"], ["status"], ["leave"], ["healthy"], ["queue"]):
        refused = command("cluster", *words)
        assert (refused.status, refused.out) == (2, "")
        assert refused.err.startswith(f"error: the record of the cluster cannot be read\n{file}: ")
        assert "Try: python -m cluster down, which" in refused.err
    assert command("serve", "status").status == command("train", str(ROOT / "configs" / "helpdesk.yaml")).status == 2
    assert command("cluster", "down").status == 0
    assert not file.exists()


def test_down_finds_what_up_started_without_its_record(home, command):
    ours, others = (spawn("kept", ["sleep", "60"], {"TANDEM_HOME": str(place)}) for place in (home, home.with_name("another")))
    try:
        (home / "cluster.json").write_text("{")
        while not all(psutil.Process(shell.pid).children() for shell in (ours, others)):
            time.sleep(0.01)
        assert command("cluster", "down").out == "down  2 processes ended\n"
        assert (ours.running(), bool(others.running())) == (None, True)
    finally:
        for member in (*ours.family(), *others.family()):
            member.kill()


def test_processes_that_ended_are_missing(home):
    session = session_of(Process("mlflow", os.getpid(), own_start()), ended_child())
    assert session.missing() == ["card0"]
    keep(home, session)
    with pytest.raises(ClusterError, match=r"(?s)the cluster is not whole: card0 ended.*Try: python -m cluster up"):
        require_session()


def test_without_its_arbiter_the_cluster_is_whole_and_up_starts_another(home, monkeypatch):
    """It waits for a session that is ready, as this one is."""
    monkeypatch.setenv("TANDEM_HOME", str(home))
    ended = replace(ended_child(), name=ARBITER)
    settings = MachineConfig().model_dump(mode="json")
    session = replace(session_of(Process("card0", os.getpid(), own_start()), ended), machine=settings)
    keep(home, session)
    write_text(token_file(), "token", mode=0o600)
    assert require_session() == session
    again = start(MachineConfig(), print)
    try:
        assert again.missing() == []
        assert [process.name for process in again.processes] == ["card0", ARBITER]
        assert read_session() == again
        log = home / "logs" / "arbiter.log"
        while "is at work" not in log.read_text():
            time.sleep(0.05)
        shell, arbiter = again.processes[1].pid, psutil.Process(again.processes[1].pid).children()[0]
        arbiter.kill()
        while log.read_text().count("is at work") < 2:
            time.sleep(0.05)
        assert psutil.Process(shell).children()[0].pid != arbiter.pid
    finally:
        for member in again.processes[1].family():
            member.kill()


def test_what_ends_by_itself_as_soon_as_it_began_is_left_alone_and_what_is_killed_is_begun_again(home):
    ended, kept = spawn("ended", ["false"], {}), spawn("kept", ["sleep", "60"], {})
    try:
        while ended.running():
            time.sleep(0.01)
        while not (sleeper := psutil.Process(kept.pid).children()):
            time.sleep(0.01)
        sleeper[0].kill()
        sleeper[0].wait()
        while not (again := psutil.Process(kept.pid).children()) or again[0].name() != "sleep":
            time.sleep(0.01)
        assert again[0].pid != sleeper[0].pid
    finally:
        for member in kept.family():
            member.kill()


def test_another_process_with_the_same_number_is_not_ours():
    assert session_of(Process("card0", os.getpid(), own_start() - 100)).missing() == ["card0"]


def test_a_zombie_is_missing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = Process("card0", child.pid, psutil.Process(child.pid).create_time())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert session_of(process).missing() == ["card0"]
    child.wait()


def test_down_ends_what_up_started_with_its_children_and_nothing_else(home):
    # `; true` keeps the shell from becoming `sleep` itself.
    ours = subprocess.Popen(["sh", "-c", "sleep 60; true"], start_new_session=True)
    other = subprocess.Popen(["sleep", "60"])
    try:
        while not (children := psutil.Process(ours.pid).children()):
            time.sleep(0.01)
        named_like_other = Process("card1", other.pid, psutil.Process(other.pid).create_time() - 100)
        keep(home, session_of(Process("card0", ours.pid, psutil.Process(ours.pid).create_time()), named_like_other))
        assert stop() == 2
        assert ours.poll() is not None
        assert not psutil.pid_exists(children[0].pid)
        assert other.poll() is None
        assert read_session() is None
        assert stop() == 0
    finally:
        for child in (ours, other):
            child.kill()
            child.wait()


@contextmanager
def killed_leader(**environment: str) -> Iterator[tuple[Process, psutil.Process]]:
    """Give a process that was killed, not yet waited for, and the child that it left in its session."""
    leader = subprocess.Popen(["sh", "-c", "sleep 60; true"], start_new_session=True, env={**os.environ, **environment})
    process = Process("mlflow", leader.pid, psutil.Process(leader.pid).create_time())
    while not (children := psutil.Process(leader.pid).children()):
        time.sleep(0.01)
    leader.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
    try:
        yield process, children[0]
    finally:
        leader.wait()
        if children[0].is_running():
            children[0].kill()


@pytest.mark.parametrize("reaped", [True, False])
def test_down_ends_what_a_killed_process_left_behind(home, reaped):
    with killed_leader() as (leader, orphan):
        if reaped:
            os.waitpid(leader.pid, 0)
        keep(home, session_of(leader))
        assert stop() == 1
        assert not orphan.is_running()


def test_down_leaves_the_session_of_somebody_else_with_a_number_of_ours(home, tmp_path):
    with killed_leader(TANDEM_HOME=str(tmp_path / "another")) as (leader, orphan):
        keep(home, session_of(leader))
        assert stop() == 0
        assert orphan.is_running()


def test_an_up_that_was_cut_off_is_no_session_and_the_next_one_ends_its_leftovers(home):
    left = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        keep(home, replace(session_of(Process("mlflow", left.pid, psutil.Process(left.pid).create_time())), ready=False))
        with pytest.raises(ClusterError, match=r"(?s)the cluster is not ready.*Try: python -m cluster up"):
            require_session()
        said: list[str] = []
        with pytest.raises(ClusterError, match="no room on disk"):
            start(MachineConfig(min_disk_free_gib=1e9), said.append)
        assert said == ["the last `up` did not finish; starting again"]
        assert left.poll() is not None
        assert read_session() is None
    finally:
        left.kill()
        left.wait()


def test_another_machine_than_the_one_that_is_up_is_refused(home):
    session = replace(session_of(Process("card0", os.getpid(), own_start())), machine=MachineConfig().model_dump(mode="json"))
    keep(home, session)
    assert start(MachineConfig(), print, "auto") == session
    with pytest.raises(ClusterError, match="up with other settings") as refused:
        start(MachineConfig(ray_port=7000), print, "desk")
    assert (refused.value.why, refused.value.remedy) == ("  ray_port=6379 runs, 7000 is asked for", "python -m cluster down")
    assert start(MachineConfig(ray_port=7000), print) == session, "who names no machine takes what is up"
    assert read_session() == session


def test_one_up_or_down_at_a_time(home):
    home.mkdir()
    with (home / "cluster.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ClusterError, match="another `up`, `down` or `restore` is at work"):
            stop()
        with pytest.raises(ClusterError, match="another `up`, `down` or `restore` is at work"):
            start(MachineConfig(), print)
    assert stop() == 0


def test_the_environment_of_a_session_carries_the_token_and_leaves_the_path(home):
    environment = session_of().environment()
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(token_file()) == str(home / "ray_token")
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert environment["TANDEM_HOME"] == str(home)
    assert environment["PATH"].endswith(os.environ["PATH"])


def test_a_shell_with_the_exports_can_start_the_next_cluster(home):
    """MLflow's address in it would be taken for another server."""
    write_exports(session_of())
    exports = (home / "env").read_text()
    assert f"export RAY_AUTH_TOKEN_PATH={token_file()}\n" in exports
    assert "MLFLOW_TRACKING_URI" not in exports


def test_where_cards_have_cores_of_their_own_rays_head_is_none_of_them(home):
    cards = [Card("card0", "serve", 2, 4.0, cores=(0, 1)), Card("card1", "train", 2, 4.0, cores=(2, 3))]
    commands = {name: command for name, command, _ in parts_of(MachineConfig(), cards, session_of())}
    assert head_name(cards) == "head"
    assert "--head" in commands["head"]
    assert "machine=head" in commands["head"], "and no label of a card"
    assert [commands[name][:3] for name in ("card0", "card1")] == [["taskset", "--cpu-list", "0,1"], ["taskset", "--cpu-list", "2,3"]]
    assert not any("--head" in commands[name] for name in ("card0", "card1"))
    sharing = [replace(card, cores=()) for card in cards]
    commands = {name: command for name, command, _ in parts_of(MachineConfig(), sharing, session_of())}
    assert head_name(sharing) == "card0"
    assert "--head" in commands["card0"]
    assert "head" not in commands


def test_each_card_sees_the_gpu_that_nvidia_smi_numbered():
    cards = find_cards(MachineConfig(), [LARGE, SMALL])
    extras = {name: extra for name, _, extra in parts_of(MachineConfig(), cards, session_of())}
    assert [extras[card.name]["CUDA_VISIBLE_DEVICES"] for card in cards] == [SMALL.index, LARGE.index]
    assert {extras[card.name]["CUDA_DEVICE_ORDER"] for card in cards} == {"PCI_BUS_ID"}


@pytest.mark.parametrize(("status", "up"), [(200, True), (401, True), (503, False)])
def test_a_service_that_asks_for_a_token_answers(status, up):
    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        Thread(target=server.handle_request).start()
        assert answers(f"http://127.0.0.1:{server.server_port}/") is up
    assert not answers(f"http://127.0.0.1:{server.server_port}/")


@pytest.mark.parametrize(
    "words",
    [
        ["cluster", "status"],
        ["serve", "status"],
        ["serve", "promote", "helpdesk:1"],
        ["serve", "rollback", "helpdesk"],
        ["serve", "bot.yaml"],
        ["train", "bot.yaml"],
    ],
    ids=" ".join,
)
def test_without_a_cluster_every_door_says_how_to_start_one(words, command, home, tmp_path):
    (tmp_path / "bot.yaml").write_text("name: bot\ndata:\n  source: chats.jsonl\n")
    ended = command(*words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == f"error: the cluster is not up\nno session in {home}\nTry: python -m cluster up\n"


def test_down_without_a_cluster_says_so(command):
    assert command("cluster", "down").out == "nothing to end: the cluster is not up\n"
