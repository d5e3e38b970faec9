"""What clients of a killed server see: a real uvicorn in a process of its own, its guardian, and `kill -9`."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.haproxy import haproxy_binary
from cluster.processes import free_port
from configs.loader import ROOT
from serve.completion_ids import REQUEST_ID
from serve.last_words import GUARDIAN_FILE
from tests.ray.stack import wait_for

EVENT = b'data: {"error": "lost"}\n\n'
SERVER = """
import asyncio, sys, time, uvicorn
from serve.last_words import LastWords, guard_connections, straight, stream_beginner

async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    how = scope["path"]
    if how.startswith("/wait"):
        print("waits", flush=True)
        await asyncio.sleep(1000)
    if how == "/stand":  # the whole process does
        print("stands", flush=True)
        time.sleep(1000)
    if how == "/ids":
        ids = b",".join(value for name, value in scope["headers"] if name == b"x-request-id")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": ids})
        return
    send = straight(scope, send) if scope["query_string"] else send
    headers = [(b"content-length", b"1000")] if how == "/whole" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if how != "/whole":
        stream_beginner(scope)()
    number = 0
    while how != "/short" or number < 3:
        piece = b"x" if how == "/whole" and number < 10 else b"" if how == "/whole" else b"data: %d\\n\\n" % number
        await send({"type": "http.response.body", "body": piece * (10_000 if how == "/much" else 1), "more_body": True})
        number += 1
        await asyncio.sleep(0 if how in ("/short", "/much") else 0.01)
    await send({"type": "http.response.body", "body": b""})

ANSWER = b"HTTP/1.1 503 Service Unavailable\\r\\nContent-Length: 4\\r\\nConnection: close\\r\\n\\r\\n"
paths = {path: LastWords(ANSWER + path[-4:].encode(), EVENT) for path in ("/long", "/short", "/much", "/wait")}
guard_connections(bool, {**paths, "/other": LastWords(ANSWER + b"oops", b"other")}, ANSWER + b"more")
print("ready", flush=True)
uvicorn.run(application, port=int(sys.argv[1]), loop=sys.argv[2], log_level="critical", lifespan="off")
"""


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def num_unread_bytes(self) -> int:
        """What its clients have sent and it has not read."""
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(int(queues.partition(":")[2], 16) for _, here, _, _, queues, *_ in sockets if here.endswith(f":{self.port:04X}"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def guardians(self) -> list[psutil.Process]:
        """The server's guardian, while it runs: nobody's child, and known by its environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(GUARDIAN_FILE) in process.cmdline() and process.environ().get("SERVER") == str(self.port):
                    found.append(process)
        return found


@pytest.fixture(params=["uvloop", "asyncio"])
def server(request) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-c", SERVER.replace("EVENT", repr(EVENT)), str(port), request.param]
    environment = {"SERVER": str(port), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        started = Server(process, port)
        wait_for(lambda: is_up(port))
        yield started
        process.kill()
    wait_for(lambda: not started.guardians(), timeout_s=30)


HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retry-on conn-failure
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    http-reuse always
    server one 127.0.0.1:{behind}
"""


@pytest.fixture
def proxied(server, tmp_path) -> Iterator[str]:
    """The address of a HAProxy that keeps its connections, as Ray Serve's does."""
    binary, port = haproxy_binary(), free_port()
    if binary is None:
        pytest.skip("no HAProxy runs here")
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(port=port, behind=server.port))
    with subprocess.Popen([binary, "-db", "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: is_up(port))
        yield f"http://127.0.0.1:{port}"
        process.kill()


def is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def begun(answer: httpx.Response) -> Iterator[bytes]:
    """An answer as it comes, when its first piece has come."""
    coming = answer.iter_raw()
    return chain([next(coming)], coming)


def test_streams_of_a_killed_server_end_with_the_event_and_whole_answers_break_off(server):
    with (
        httpx.Client() as client,
        client.stream("GET", f"{server.address}/long") as first,
        client.stream("GET", f"{server.address}/long") as second,
        client.stream("GET", f"{server.address}/whole") as whole,
    ):
        coming = [begun(answer) for answer in (first, second, whole)]
        server.kill()
        for stream in coming[:2]:
            events = b"".join(stream).split(b"\n\n")
            assert events[-2:] == [EVENT.strip(), b""], "the last event, and the right end of the answer"
            numbers = [int(event.removeprefix(b"data: ")) for event in events[:-2]]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "nothing is lost or cut before it"
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(coming[2])


def test_a_connection_whose_stream_ended_is_nobodys_business(server):
    with httpx.Client() as client:
        for _ in range(20):
            assert client.get(f"{server.address}/short").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
        with client.stream("GET", f"{server.address}/whole") as whole:
            coming = begun(whole)
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                assert EVENT not in b"".join(coming)


def test_a_connection_is_handed_over_once_and_its_next_stream_ends_with_words_of_its_own(server):
    (guardian,) = server.guardians()
    num_open = guardian.num_fds()
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{server.address}/short").text.endswith("data: 2\n\n")
            wait_for(lambda: guardian.num_fds() == num_open + 1, timeout_s=30)  # the one connection, between its streams too
        with client.stream("GET", f"{server.address}/other") as answer:
            coming = begun(answer)
            server.kill()
            assert b"".join(coming).endswith(b"other")


@pytest.mark.parametrize("is_kept", [False, True], ids=["new", "kept"])
@pytest.mark.parametrize(("path", "words"), [("/wait", "wait"), ("/wait-elsewhere", "more")])
def test_a_request_that_waits_is_answered_where_its_server_is_killed(server, path, words, is_kept):
    with httpx.Client() as client, ThreadPoolExecutor(1) as pool:
        if is_kept:
            client.get(f"{server.address}/short")
        asked = pool.submit(client.post, f"{server.address}{path}", content=b"x" * 10_000)
        assert server.says() == "waits"
        server.kill()
        assert (asked.result().status_code, asked.result().text) == (503, words)


def test_a_request_that_nobody_has_read_is_answered_too(server):
    """The server stands still in another's; a body that is on its way is taken in before the connection is closed."""
    with httpx.Client() as client, httpx.Client() as other, ThreadPoolExecutor(2) as pool:
        client.get(f"{server.address}/short")
        stands = pool.submit(other.get, f"{server.address}/stand")
        assert server.says() == "stands"
        asked = pool.submit(client.post, f"{server.address}/short", content=b"x" * 10_000_000)
        wait_for(lambda: server.num_unread_bytes() > 50_000)
        server.kill()
        assert (asked.result().status_code, asked.result().text) == (503, "more")
        assert stands.result().status_code == 503


def test_a_connection_on_which_nobody_asks_is_closed_without_a_word(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /ids HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(connection, b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
        server.kill()
        assert rest(connection) == b""


def read_until(connection: socket.socket, words: bytes) -> bytes:
    said = b""
    while words not in said:
        piece = connection.recv(4096)
        assert piece, said
        said += piece
    return said


def rest(connection: socket.socket) -> bytes:
    said = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(4096):
            said += piece
    return said


def test_an_answer_that_waited_for_another_gets_none_in_its_midst(server):
    """Of requests in one write; another comes, which nobody reads meanwhile."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"/short", b"/whole")))
        read_until(connection, b"xxx")
        connection.sendall(b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        server.kill()
        assert b"HTTP" not in rest(connection)


@pytest.mark.parametrize("is_whole", [False, True])
def test_an_answer_that_came_before_its_request_was_whole_is_the_only_one(server, is_whole):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /ids HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n0123456789")
        read_until(connection, b"0\r\n\r\n")
        connection.sendall(b"0123456789" if is_whole else b"01234")
        if is_whole:
            connection.sendall(b"GET /ids HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(connection, b"0\r\n\r\n")
        server.kill()
        assert rest(connection) == b""


def test_a_request_of_which_only_a_part_has_come_is_answered(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /ids HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"0\r\n\r\n")
        connection.sendall(b"GET /ids HTTP/1.1\r\nHo")
        wait_for(lambda: server.num_unread_bytes() == 0)
        server.kill()
        assert rest(connection).startswith(b"HTTP/1.1 503")


def test_behind_haproxy_a_request_of_a_kept_connection_is_answered_too(server, proxied):
    """By itself HAProxy closes its client's connection where the server's was used before, and says nothing."""
    with httpx.Client() as client, ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            assert client.get(f"{proxied}/short").status_code == 200
        asked = pool.submit(client.post, f"{proxied}/wait", json={"a": "x" * 1000})
        assert server.says() == "waits"
        server.kill()
        assert (asked.result().status_code, asked.result().text) == (503, "wait")


def test_what_goes_straight_to_the_connection_comes_as_it_was_sent(server):
    with httpx.Client() as client:
        assert client.get(f"{server.address}/short?straight").text == client.get(f"{server.address}/short").text
        with client.stream("GET", f"{server.address}/whole?straight") as whole:
            assert begun(whole), "an answer with a length, which is in no chunks"
        with client.stream("GET", f"{server.address}/much?straight") as much:
            wait_for(lambda: is_full(server), timeout_s=60)  # it waits for its reader
            lines = much.iter_lines()
            numbers = [line for line in (next(lines) for _ in range(100_000)) if line]
    assert numbers == sorted(numbers, key=lambda line: int(line.removeprefix("data: ")))


def test_of_two_requests_in_one_write_each_gets_its_own_answer(server):
    """The second is read while the first one's answer is under way."""
    request = b"GET /short?straight HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request * 2)
        said = b""
        while said.count(b"0\r\n\r\n") < 2:
            piece = connection.recv(4096)
            assert piece, said
            said += piece
    assert [said.count(b"data: %d\n\n" % number) for number in range(3)] == [2, 2, 2]


def test_a_connection_that_is_upgraded_is_nobodys_business(server):
    (guardian,) = server.guardians()
    num_open = guardian.num_fds()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: guardian.num_fds() == num_open + 1, timeout_s=30)
        while b"0\r\n\r\n" not in connection.recv(4096):
            pass
        asked = "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        connection.sendall("\r\n".join(["GET /ws HTTP/1.1", "Host: x", *asked, "", ""]).encode())
        wait_for(lambda: guardian.num_fds() == num_open, timeout_s=30)


def test_what_a_client_left_is_let_go(server):
    (guardian,) = server.guardians()
    num_open = guardian.num_fds()
    for _ in range(3):
        with httpx.stream("GET", f"{server.address}/long") as answer:
            coming = begun(answer)
            wait_for(lambda: guardian.num_fds() == num_open + 1, timeout_s=30)
            assert next(coming)
        wait_for(lambda: guardian.num_fds() == num_open, timeout_s=30)


def test_a_guardian_without_time_keeps_no_client_waiting_and_holds_nothing_for_good(server):
    """It is stopped here; what it cannot be told fills its line, and then goes without it."""
    (guardian,) = server.guardians()
    guardian.suspend()
    ends = []
    for _ in range(400):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(b"GET /short HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            said = b""
            while piece := connection.recv(4096):
                said += piece
        ends.append(said.endswith(b"data: 2\n\n\r\n0\r\n\r\n"))
    with httpx.Client() as client:
        for _ in range(20):
            assert client.get(f"{server.address}/short").text.endswith("data: 2\n\n")
        guardian.resume()
        with client.stream("GET", f"{server.address}/whole") as whole:
            coming = begun(whole)
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                assert EVENT not in b"".join(coming)
    assert all(ends)


def test_a_reader_that_stands_still_gets_no_words_in_the_midst_of_others(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: is_full(server))
        (guardian,) = server.guardians()
        server.kill()
        guardian.wait(30)  # it looks before the reader goes on
        said = b""
        try:
            while piece := connection.recv(2**20):
                said += piece
        except ConnectionResetError:
            pass
    assert EVENT not in said


def is_full(server: Server) -> bool:
    """Whether the server has nothing left to do but wait."""
    process = psutil.Process(server.process.pid)
    return process.cpu_percent(0.3) < 20


def test_without_its_guardian_a_server_goes_on_and_a_guardian_does_not_outlive_it(server):
    (guardian,) = server.guardians()
    assert guardian.memory_full_info().uss < 16 * 2**20
    guardian.terminate()
    with httpx.Client() as client:
        assert client.get(f"{server.address}/short").text.endswith("data: 2\n\n"), "it does not listen to the signal of a stop"
        assert guardian.is_running()
        guardian.kill()
        wait_for(lambda: not server.guardians())
        for _ in range(3):
            assert client.get(f"{server.address}/short").text.endswith("data: 2\n\n")
        with client.stream("GET", f"{server.address}/long") as answer:
            coming = begun(answer)
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                b"".join(coming)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ([], False),
        ([b"one"], True),
        ([b"one", b"two"], True),
        ([b""], False),
        ([b"my id"], False),
        ([b"\xff"], False),
        ([b"x" * 65], False),
    ],
)
def test_a_request_has_one_id_which_may_stand_in_ours(server, given, is_kept):
    first, second = (httpx.get(f"{server.address}/ids", headers=[(b"X-Request-Id", value) for value in given]).text for _ in range(2))
    assert REQUEST_ID.fullmatch(first)
    assert (first == given[-1].decode()) if is_kept else (first != second)
