"""`python -m cluster.gate`: the way of joined machines to the head's MLflow, which has no door of its own and stays on loopback.

On the head it listens at `listen_host`, asks for a key made from the cluster's token, and hands on to MLflow; it also tells a machine that
joins what it must know. On a joined machine it listens on loopback and shows the key, so that MLflow has the same address everywhere.
Knows HTTP. Does not know MLflow. There is nothing in it for users.
"""

import hmac
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from cluster.session import machine_key, read_session
from configs.errors import ClusterError
from configs.schema import is_loopback

INTRODUCTION = "/tandem"  # where the head tells a machine what it must know to join
HOP_BY_HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"authorization"}
CONNECT_TIMEOUT_S = 10.0
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Hands requests on to one address, piece by piece.

    Args:
        target: Where to; nothing is handed on where it is empty.
        key: What a client must show (`is_door`), or what is shown to the target.
        is_door: Whether this is the head's end.
    """

    def __init__(self, target: str, key: str, is_door: bool) -> None:
        self.target, self.key, self.is_door = target, key, is_door
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), trust_env=False)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        shown = headers.get(b"authorization", b"")
        if not self.is_door and not is_loopback(_host_of(headers.get(b"host", b""))):
            # A page in a browser, whose name was made to mean loopback: MLflow refuses such, and sees our own name for it here.
            await _answer(send, 403, {"error": "this gate answers to localhost alone"})
        elif self.is_door and not hmac.compare_digest(shown, f"Bearer {self.key}".encode()):
            await _answer(send, 401, {"error": "this gate asks for the cluster's key"})
        elif self.is_door and scope["path"] == INTRODUCTION:
            await _answer(send, 200, introduction())
        elif not self.target:
            await _answer(send, 404, {"error": "MLflow is elsewhere (MLFLOW_TRACKING_URI)"})
        else:
            await self._hand_on(scope, receive, send)

    async def _hand_on(self, scope: Message, receive: Receive, send: Send) -> None:
        query = scope["query_string"].decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        if not path.startswith("/"):  # the `*` of OPTIONS; joined to an address it would be another one
            await _answer(send, 400, {"error": f"no such path: {path}"})
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP]
        if not self.is_door:
            headers.append((b"authorization", f"Bearer {self.key}".encode()))
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        body = _pieces(receive) if has_body else None
        url = f"{self.target}{path}{'?' if query else ''}{query}"
        request = self.client.build_request(scope["method"], url, headers=headers, content=body)
        try:
            answer = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            await _answer(send, 502, {"error": f"{self.target} does not answer: {type(error).__name__}"})
            return
        try:
            kept = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in HOP_BY_HOP]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()


def introduction() -> dict[str, Any]:
    """Return what a machine that joins must know of the head."""
    session = read_session()
    if session is None or not session.ready:
        return {"ready": False}
    return {
        "ready": True,
        "versions": session.versions,
        "ray_address": session.ray_address,
        "dashboard_url": session.dashboard_url,
        "mlflow_url": session.mlflow_url if session.has_mlflow() else None,
        "storage": session.storage,
        "lends": session.lending.enabled,
        "has_haproxy": session.has_haproxy,
    }


def _host_of(header: bytes) -> str:
    try:
        return urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    except ValueError:
        return ""


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise httpx.ReadError("the client went away")
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _answer(send: Send, status: int, told: dict[str, Any]) -> None:
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Listen at an address and hand on to another: HOST PORT TARGET door|window."""
    import uvicorn

    host, port, target, end = sys.argv[1:]
    key = machine_key()
    if key is None:
        raise ClusterError("there is no token", remedy="python -m cluster up")
    uvicorn.run(Gate(target, key, is_door=end == "door"), host=host, port=int(port), log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
