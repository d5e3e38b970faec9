"""The way from a joined machine to the head's MLflow: both ends of it, over real sockets, with a server behind that echoes."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import uvicorn

from cluster.gate import INTRODUCTION, Gate
from cluster.processes import free_port
from tests.helpers.json_door import listening

LARGE = 3 * 2**20


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        told = {"path": self.path, "size": len(body), "headers": {key.lower(): value for key, value in self.headers.items()}}
        self._send(201, json.dumps(told).encode())

    def do_GET(self) -> None:
        if "Content-Length" in self.headers:
            self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"x" * LARGE)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def gate(target: str, key: str, is_door: bool) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Gate(target, key, is_door), port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def door() -> Iterator[str]:
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as mlflow, gate(mlflow, "right", is_door=True) as door:
        yield door


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}])
@pytest.mark.parametrize("path", ["/api", INTRODUCTION])
def test_the_door_asks_for_the_key(door, shown, path):
    assert httpx.get(door + path, headers=shown).status_code == 401


def test_what_goes_in_by_the_window_comes_to_mlflow_as_it_was_and_back(door):
    with gate(door, "right", is_door=False) as window:
        body = (b"y" * 2**16 for _ in range(LARGE // 2**16))
        put = httpx.put(f"{window}/a%20b/c?d=e%26f", content=body, headers={"Content-Length": str(LARGE), "X-Own": "1"})
        assert put.status_code == 201
        told = put.json()
        assert (told["path"], told["size"], told["headers"]["x-own"]) == ("/a%20b/c?d=e%26f", LARGE, "1")
        assert "authorization" not in told["headers"], "the key goes no further than the door"
        assert httpx.get(f"{window}/artifact").content == b"x" * LARGE


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:5000", 200), ("[::1]:5000", 200), ("evil.example:5000", 403), ("[", 403), ("", 403)]
)
def test_a_window_answers_to_no_name_that_was_made_to_mean_loopback(door, host, status):
    with gate(door, "right", is_door=False) as window:
        assert httpx.get(f"{window}/artifact", headers={"Host": host}).status_code == status


def test_what_is_no_path_is_refused(door):
    with gate(door, "right", is_door=False) as window, socket.create_connection(("127.0.0.1", int(window.rpartition(":")[2]))) as line:
        line.sendall(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert line.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_window_with_another_key_is_refused(door):
    with gate(door, "wrong", is_door=False) as window:
        assert httpx.get(f"{window}/artifact").status_code == 401


def test_what_does_not_answer_behind_the_gate_is_told():
    with gate(f"http://127.0.0.1:{free_port()}", "right", is_door=False) as window:
        answer = httpx.get(f"{window}/artifact")
    assert answer.status_code == 502
    assert "does not answer" in answer.json()["error"]


def test_the_door_tells_a_machine_what_it_must_know_and_no_secret(up, door):
    shown = {"Authorization": "Bearer right"}
    session = up(mlflow_url="http://127.0.0.1:5000")
    answer = httpx.get(door + INTRODUCTION, headers=shown)
    assert answer.status_code == 200
    told = answer.json()
    assert told["ready"]
    assert (told["ray_address"], told["dashboard_url"]) == (session.ray_address, session.dashboard_url)
    assert told["mlflow_url"] is None, "MLflow is none of this session's processes"
    assert told["versions"] == session.versions
    assert "token" not in answer.text
