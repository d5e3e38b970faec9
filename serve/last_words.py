"""A stream whose replica is killed ends with an error, and does not just break off: its connection is known to a second process.

Knows uvicorn's protocol of a connection, and `serve.guardian`. Does not know what is streamed. Costs a stream two messages over a
socket, and a piece of it nothing.
"""

import logging
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.guardian import NUMBER
from serve.refusal import Scope

EXTENSION = "tandem.guardian"  # of an ASGI scope
# Ray Serve's word of a client for whom it need not look whether the client goes away: two tasks less a request, and the turns between them.
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
GUARDIAN_FILE = Path(__file__).with_name("guardian.py")
START_TIMEOUT_S = 30.0
log = logging.getLogger("tandem.serve")


class Guardian:
    """The line to a guardian process, which ends when the line does."""

    def __init__(self, may_wait: Callable[[], bool]) -> None:
        self.may_wait = may_wait
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        with theirs:
            command = [sys.executable, "-I", "-S", str(GUARDIAN_FILE)]
            subprocess.run(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, check=True, timeout=START_TIMEOUT_S)

    def hold(self, number: int, words: bytes) -> bool:
        """Hand over a connection, by the number of its descriptor; return whether it is held now."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", number))
        try:
            self._line.sendmsg([NUMBER.pack(number), words], [rights])
        except OSError:  # it has more to do than it can, or is gone: the stream goes on without
            return False
        return True

    def release(self, number: int) -> bool:
        """Take a connection back; return False where the guardian is too busy to be told."""
        try:
            self._line.send(NUMBER.pack(number))
        except BlockingIOError:
            return False
        except OSError:  # it is gone, and holds nothing
            return True
        return True


class GuardedProtocol(HttpToolsProtocol):
    """One connection, which an application may have guarded while it streams an answer: `hold` in the scope's extension."""

    guardian: ClassVar[Guardian | None] = None
    _held: int | None = None

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: {"hold": self.hold}}

    def on_headers_complete(self) -> None:
        """Hand the request on, with our word of whether Ray Serve watches its client, and not the client's own."""
        self.headers[:] = [header for header in self.headers if header[0] != UNWATCHED[0]]
        if self.guardian and not self.guardian.may_wait():  # the engine's application itself looks whether its client is still there
            self.headers.append(UNWATCHED)
        super().on_headers_complete()

    def hold(self, event: bytes) -> None:
        """Have the answer, whose head was sent, ended with an event if this process dies before it can end it."""
        if self.guardian and self._held is None and self.cycle.chunked_encoding:
            number = self.transport.get_extra_info("socket").fileno()
            if self.guardian.hold(number, b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)):
                self._held = number

    def on_response_complete(self) -> None:
        """Take the connection back; it may get the next request."""
        if self._held is not None and not self._release():
            self.transport.close()  # what cannot be taken back is not used again
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection for the guardian too, whether or not it can be told."""
        connection = socket.socket(fileno=self.transport.get_extra_info("socket").fileno())  # open until this method is left
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.detach()
        if self._held is not None:
            self._release()
        super().connection_lost(exc)

    def _release(self) -> bool:
        assert self.guardian
        assert self._held is not None
        if released := self.guardian.release(self._held):
            self._held = None
        return released


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
    extension: dict[str, Any] = (scope.get("extensions") or {}).get(EXTENSION) or {}
    return extension.get("hold")
