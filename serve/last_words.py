"""A stream whose replica is killed ends with an error, and does not just break off: its connection is known to a second process.

Knows uvicorn's protocol of a connection, and `serve.guardian`. Does not know what is streamed. Costs a connection two messages over a
socket, a stream on it two bytes of memory, and a piece of it nothing: it passes Ray Serve's senders by.
"""

import logging
import mmap
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.completion_ids import ID_HEADER, request_id_of
from serve.guardian import NUM_CONNECTIONS, NUMBER
from serve.refusal import Message, Scope, Send, send_nothing

EXTENSION = "tandem.guardian"  # of an ASGI scope
# Ray Serve's word of a client for whom it need not look whether the client goes away: two tasks less a request, and the turns between them.
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
GUARDIAN_FILE = Path(__file__).with_name("guardian.py")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (a file without a name)
START_TIMEOUT_S = 30.0
log = logging.getLogger("tandem.serve")


class Guardian:
    """The line to a guardian process, which ends when the line does."""

    def __init__(self, may_wait: Callable[[], bool]) -> None:
        self.may_wait = may_wait
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        with theirs, tempfile.TemporaryFile(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as table:
            table.truncate(NUM_CONNECTIONS)
            self.streams = mmap.mmap(table.fileno(), NUM_CONNECTIONS)
            """By a connection's number: 1 while a stream is under way on it, which is not told each time."""
            command = [sys.executable, "-I", "-S", str(GUARDIAN_FILE)]
            subprocess.run(command, stdin=theirs.fileno(), stdout=table, check=True, timeout=START_TIMEOUT_S)

    def hold(self, number: int, words: bytes) -> bool:
        """Hand over a connection, by the number of its descriptor; return whether it is held now."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", number))
        try:
            self._line.sendmsg([NUMBER.pack(number), words], [rights])
        except OSError:  # it has more to do than it can, or is gone: the stream goes on without
            return False
        return True

    def release(self, number: int) -> bool:
        """Take back a connection; return False where the guardian is too busy to be told: it then holds it until its number comes again."""
        try:
            self._line.send(NUMBER.pack(number))
        except BlockingIOError:
            return False
        except OSError:  # it is gone, and holds nothing
            return True
        return True


class GuardedProtocol(HttpToolsProtocol):
    """One connection, which an application may have guarded while it streams an answer, and write to: in its scope's extension."""

    guardian: ClassVar[Guardian | None] = None
    _held: tuple[int, bytes] | None = None
    """This connection's number, and the event that it ends with, where the guardian holds it."""

    def on_headers_complete(self) -> None:
        """Hand the request on with one id, and with our word, and not its client's, of whether Ray Serve watches that client."""
        given = [value for name, value in self.headers if name == ID_HEADER]
        self.headers[:] = [header for header in self.headers if header[0] not in (UNWATCHED[0], ID_HEADER)]
        self.headers.append((ID_HEADER, request_id_of(given[-1] if given else b"").encode()))  # Ray Serve says it again, as it came
        if self.guardian and not self.guardian.may_wait():  # the engine's application itself looks whether its client is still there
            self.headers.append(UNWATCHED)
        super().on_headers_complete()
        cycle = self.cycle  # that of the newest request: an older one's answer may still be under way
        if cycle and cycle.scope is self.scope:
            self.scope["extensions"] = {EXTENSION: {"hold": partial(self._hold, cycle), "send_piece": partial(self._send_piece, cycle)}}

    def handle_websocket_upgrade(self) -> None:
        """Take the connection back, which from now on is another protocol's."""
        held, self._held = self._held, None
        if self.guardian and held and not self.guardian.release(held[0]):
            self.transport.close()
            return
        super().handle_websocket_upgrade()

    def _hold(self, cycle: RequestResponseCycle, event: bytes) -> None:
        """Have the answer, whose head was sent, ended with an event if this process dies before it can end it."""
        if not self.guardian or not cycle.chunked_encoding:
            return
        if self._held is None or self._held[1] != event:
            number = self.transport.get_extra_info("socket").fileno()
            words = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
            if number >= NUM_CONNECTIONS or not self.guardian.hold(number, words):
                return
            self._held = number, event
        self.guardian.streams[self._held[0]] = 1

    def _send_piece(self, cycle: RequestResponseCycle, message: Message) -> Awaitable[None]:
        """Send a piece, neither first nor last, of an answer: uvicorn's `send`, without what is only of the others."""
        if not cycle.chunked_encoding or cycle.response_complete or cycle.disconnected or cycle.flow.write_paused:
            return cycle.send(message)  # type: ignore[arg-type]
        body = message["body"]
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return send_nothing()

    def on_response_complete(self) -> None:
        """Take note that no stream is under way; the connection may get the next request."""
        self._end_stream()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection for the guardian too, whether or not it can be told."""
        connection = socket.socket(fileno=self.transport.get_extra_info("socket").fileno())  # open until this method is left
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.detach()
        self._end_stream()
        if self.guardian and self._held:
            self.guardian.release(self._held[0])
        super().connection_lost(exc)

    def _end_stream(self) -> None:
        if self.guardian and self._held:
            self.guardian.streams[self._held[0]] = 0


def guard_streams(may_wait: Callable[[], bool]) -> None:
    """Start a guardian, and have uvicorn's servers of this process from now on use it; without one, streams break off as ever.

    `may_wait` tells whether a request may wait long before the engine's application has it: then Ray Serve looks whether it is given up.
    """
    try:
        GuardedProtocol.guardian = Guardian(may_wait)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("a stream will break off where this engine is killed: %s", error)
        return
    HTTP_PROTOCOLS["auto"] = GuardedProtocol  # type: ignore[assignment]


def hold_of(scope: Scope) -> Callable[[bytes], None] | None:
    """Return what has the connection of a request guarded; None where nothing does."""
    hold: Callable[[bytes], None] | None = _extension(scope).get("hold")
    return hold


def straight(scope: Scope, send: Send) -> Send:
    """Return a `send` that has the middle of an answer written by the connection itself; `send` as it is where that is not ours.

    What Ray Serve has between the two looks at each piece, only to see whether it is the first or the last.
    """
    send_piece: Send | None = _extension(scope).get("send_piece")
    if send_piece is None:
        return send

    def send_straight(message: Message) -> Awaitable[None]:
        return send_piece(message) if message.get("more_body") and message.get("body") else send(message)

    return send_straight


def _extension(scope: Scope) -> dict[str, Any]:
    return (scope.get("extensions") or {}).get(EXTENSION) or {}
