"""What our front adds to a request and to a streamed piece: vLLM's place is taken by an application that does nothing.

`PYTHONPATH=. python tests/benchmarks/front.py`; no cluster, no sockets. The baseline is that application alone, in the same loop.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench import write_result

from cluster.logs import Streams
from cluster.registry import Version
from cluster.standing import Standing
from configs.schema import LogConfig, ServeConfig
from data.feedback_store import FeedbackStore
from serve.adapters import Adapters, Base
from serve.completion_ids import CompletionIds
from serve.feedback import FeedbackDesk
from serve.front import Doors, Front
from serve.keys import KeyFile
from serve.quotas import ClusterQuotas
from serve.request_log import request_log

NUM_REQUESTS = 3000
NUM_PIECES = 200
BASE = Base("base", "0123456789abcdef", max_lora_rank=16)
BODY = json.dumps({"model": "base", "stream": True, "messages": [{"role": "user", "content": "How do I roll back? " * 20}]}).encode()
PIECE = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'


class EmptyRegistry:
    """A registry without versions."""

    def standings(self) -> dict[str, Standing]:
        return {}

    def versions(self, standings: dict[str, Standing]) -> list[Version]:
        return []


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the body and answer in pieces, as an engine does that takes no time."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(scope["num_pieces"]):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def request_s(app: Any, headers: list[tuple[bytes, bytes]], num_pieces: int) -> float:
    """Send one request, and return the seconds to its end."""
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "num_pieces": num_pieces}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    began_s = time.perf_counter()
    await app(scope, receive, send)
    return time.perf_counter() - began_s


async def median_ms(app: Any, headers: list[tuple[bytes, bytes]], num_pieces: int) -> float:
    """Return the median milliseconds of a request with so many pieces."""
    return median([await request_s(app, headers, num_pieces) for _ in range(NUM_REQUESTS)]) * 1000


async def measure(keys: KeyFile, logs: Path) -> dict[str, float]:
    """Return the milliseconds of both, for an answer of one piece and of many; the front writes its log."""
    headers = [(b"authorization", f"Bearer {keys.create('bench')}".encode()), (b"content-type", b"application/json")]
    adapters = Adapters(EmptyRegistry(), BASE)  # type: ignore[arg-type]
    await adapters.refresh()
    config = ServeConfig()
    desk = FeedbackDesk(config.feedback, FeedbackStore("sqlite://"), CompletionIds("secret"))
    front = Front(application, adapters, Doors(keys, ClusterQuotas()), desk, config)
    front.watch.observers.append(request_log(Streams(logs, LogConfig())))
    figures = {}
    for name, app in (("alone", application), ("front", front)):
        figures[f"{name}_request_ms"] = await median_ms(app, headers, 1)
        figures[f"{name}_long_ms"] = await median_ms(app, headers, NUM_PIECES)
        figures[f"{name}_piece_us"] = (figures[f"{name}_long_ms"] - figures[f"{name}_request_ms"]) * 1000 / (NUM_PIECES - 1)
    figures["added_request_ms"] = figures["front_request_ms"] - figures["alone_request_ms"]
    figures["added_piece_us"] = figures["front_piece_us"] - figures["alone_piece_us"]
    return figures


def main() -> None:
    """Measure, and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(KeyFile(Path(folder) / "keys.json"), Path(folder)))
    write_result("front", figures, {"num_requests": NUM_REQUESTS, "num_pieces": NUM_PIECES, "with": "a key without quotas"})


if __name__ == "__main__":
    main()
