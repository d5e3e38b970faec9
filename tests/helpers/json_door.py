"""A real HTTP server on this machine, for tests of what talks to one: answers JSON, and says nothing on the terminal."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


class JsonDoor(BaseHTTPRequestHandler):
    """What every such server's handler shares; the methods are the test's own."""

    def send_json(self, status: int, value: object, **headers: str) -> None:
        self.send_body(status, json.dumps(value).encode(), content_type="application/json", **headers)

    def send_body(self, status: int, body: bytes, **headers: str) -> None:
        """Answer; a header's name has `_` for each `-`."""
        self.send_response(status)
        for name, value in {**headers, "content_length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def listening(server: HTTPServer) -> Iterator[str]:
    """Serve in the background; yield the address."""
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
