"""What listens, and for whom: the proxy, the replica's own port, and what HAProxy adds to them."""

from pathlib import Path

import httpx
import pytest

from cluster.haproxy import haproxy_binary
from tests.ray.stack import Stack


def listeners(stack: Stack, title: str) -> list[tuple[str, int]]:
    """Address and port of all that this stack's processes of a title listen on."""
    found = [entry.laddr for process in stack.workers(title) for entry in process.net_connections("inet") if entry.status == "LISTEN"]
    return [(address.ip, address.port) for address in found]


@pytest.mark.skipif(haproxy_binary() is None, reason="there is no HAProxy for this machine")
def test_haproxy_stands_before_the_engine_and_listens_on_loopback_alone(stack: Stack, served):
    found = listeners(stack, "haproxy.cfg")
    assert found == [("127.0.0.1", stack.ports["chat"])], "neither statistics nor metrics"


def test_a_replicas_own_port_is_on_loopback_and_asks_for_a_key(stack: Stack, served, secret, tiny_model):
    found = listeners(stack, "ServeReplica")
    http = [port for _, port in found if is_http(port)]
    assert len(http) == (1 if haproxy_binary() else 0)
    for port in http:
        assert ("127.0.0.1", port) in found
        body = {"model": tiny_model.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        assert httpx.post(url, json=body, timeout=60, headers={"Authorization": f"Bearer {secret}"}).status_code == 200
        for closed in ("/v1/load_lora_adapter", "/metrics", "/docs", "/server_info"):
            headers = {"Authorization": f"Bearer {secret}"}
            assert httpx.post(f"http://127.0.0.1:{port}{closed}", json={}, headers=headers, timeout=60).status_code == 404


def is_http(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).status_code == 401
    except httpx.HTTPError:
        return False


@pytest.mark.skipif(haproxy_binary() is None, reason="there is no HAProxy for this machine")
def test_haproxys_admin_socket_is_its_owners(stack: Stack, served):
    """Ray makes the socket itself open to all."""
    words = stack.workers("haproxy.cfg")[0].cmdline()
    folder = Path(words[words.index("-f") + 1]).parent
    assert (folder / "admin").is_socket()
    assert folder.parent.stat().st_mode & 0o077 == 0
