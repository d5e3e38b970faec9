"""HAProxy's launcher, with the real HAProxy: what it closes of a configuration as Ray writes it."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.haproxy import haproxy_binary, proxy_environment
from cluster.processes import free_port
from configs.schema import MachineConfig

pytestmark = pytest.mark.skipif(haproxy_binary() is None, reason="there is no HAProxy for this machine")

AS_RAY_WRITES_IT = """global
    maxconn {maxconn}
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
    errorfile 504 {folder}/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{chat}
    use_backend nobody if {{ path /gone }}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend nobody
    server gone 127.0.0.1:{gone}
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A socket's path must be short, and pytest's own folders are not."""
    with tempfile.TemporaryDirectory() as short:
        yield Path(short) / "proxy"


@pytest.fixture
def environment(folder) -> dict[str, str]:
    return proxy_environment(MachineConfig(), folder, 2)


@pytest.fixture
def proxy(environment, folder):
    """HAProxy, started as Ray starts it, before a replica that has gone."""
    named = {name.removeprefix("RAY_SERVE_HAPROXY_"): value for name, value in environment.items()}
    ports = {"chat": free_port(), "gone": free_port()}
    (folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 21\r\n\r\nInternal Server Error")
    file = Path(named["CONFIG_FILE_LOC"])
    file.write_text(AS_RAY_WRITES_IT.format(folder=folder, maxconn=named["MAXCONN"], **ports))
    child = subprocess.Popen([named["BINARY_PATH"], "-db", "-f", str(file), "-dR"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (found := listening(child)) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield ports["chat"], found
    child.terminate()
    child.wait(10)


def listening(child: subprocess.Popen) -> list:
    try:
        return [entry.laddr for entry in psutil.Process(child.pid).net_connections("inet") if entry.status == "LISTEN"]
    except psutil.Error:
        return []


def test_all_that_it_listens_on_is_the_chats_port(proxy):
    port, found = proxy
    assert [(address.ip, address.port) for address in found] == [("127.0.0.1", port)]


@pytest.mark.parametrize("path", ["/gone", "/v1/models"], ids=["its replica has gone", "its application is not there yet"])
def test_what_is_not_there_now_is_503_in_openais_shape_and_worth_another_try(proxy, path):
    port, _ = proxy
    answer = httpx.get(f"http://127.0.0.1:{port}{path}")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_its_files_are_its_owners(environment):
    places = [Path(value) for name, value in environment.items() if name.endswith(("_LOC", "_PATH", "_FILE"))]
    assert len(places) == 5
    assert {path.parent.stat().st_mode & 0o077 for path in places} == {0}
    assert os.access(environment["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)


def test_another_proxy_may_be_asked_for_and_takes_the_place_where_haproxys_sockets_would_not_open(folder, tmp_path):
    assert proxy_environment(MachineConfig(http_proxy="python"), folder, 2) == {}
    assert proxy_environment(MachineConfig(), tmp_path / ("long" * 20), 2) == {}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("num_cards", "host", "num_cores", "num_threads"),
    [
        (1, "127.0.0.1", 16, 1),
        (2, "127.0.0.1", 16, 1),
        (4, "127.0.0.1", 16, 2),
        (64, "127.0.0.1", 16, 4),
        (64, "127.0.0.1", 2, 2),
        (1, "10.0.0.5", 16, 4),
    ],
)
def test_a_thread_of_haproxy_is_for_two_cards_and_for_others_that_may_join(folder, monkeypatch, num_cards, host, num_cores, num_threads):
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    machine = MachineConfig(listen_host=host)
    assert proxy_environment(machine, folder, num_cards)["RAY_SERVE_HAPROXY_NBTHREAD"] == str(num_threads)
