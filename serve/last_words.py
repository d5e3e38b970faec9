"""A request that waits where its replica is killed gets an answer, and a stream an end: a second process has the connections too.

HAProxy would not answer for the replica where it has used the connection before: it breaks off then, for the client to ask again.
Knows uvicorn's protocol of a connection, and `serve.guardian`. Does not know what is answered. Costs a connection two messages over a
socket, an answer three bytes of memory, and a piece of a stream nothing: it passes Ray Serve's senders by.
"""

import asyncio
import logging
import mmap
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.completion_ids import ID_HEADER, request_id_of
from serve.guardian import ASKED, BEGUN, IDLE, NUM_CONNECTIONS, NUMBER
from serve.refusal import Message, Scope, Send, send_nothing

EXTENSION = "tandem.guardian"  # of an ASGI scope
# Ray Serve's word of a client for whom it need not look whether the client goes away: two tasks less a request, and the turns between them.
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
GUARDIAN_FILE = Path(__file__).with_name("guardian.py")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (a file without a name)
START_TIMEOUT_S = 30.0
log = logging.getLogger("tandem.serve")


@dataclass(frozen=True)
class LastWords:
    """What a route's clients are told when their replica has died."""

    answer: bytes
    """A whole HTTP answer, to who has none yet."""
    event: bytes
    """The last of a stream."""

    @property
    def chunk(self) -> bytes:
        """The event as HTTP sends it, and the stream's end."""
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(self.event), self.event)


class Guardian:
    """The line to a guardian process, which ends when the line does."""

    def __init__(self, may_wait: Callable[[], bool], words: Mapping[str, LastWords], other: bytes) -> None:
        self.may_wait = may_wait
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        told = [other, b"", other]  # at `IDLE`, `BEGUN` and `ASKED`
        self._places: dict[str, int] = {}
        for path, of_path in words.items():
            self._places[path] = len(told)
            told += [of_path.answer, of_path.chunk]
        with theirs, tempfile.TemporaryFile(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as table:
            table.truncate(NUM_CONNECTIONS)
            self.states = mmap.mmap(table.fileno(), NUM_CONNECTIONS)
            """By a connection's number: the place among the words of what is to be said on it."""
            command = [sys.executable, "-I", "-S", str(GUARDIAN_FILE), *(each.hex() for each in told)]
            subprocess.run(command, stdin=theirs.fileno(), stdout=table, check=True, timeout=START_TIMEOUT_S)

    def place(self, path: str) -> int:
        """Return the place of the answer to a path's request; that of its event is the next."""
        return self._places.get(path, ASKED)

    def hold(self, number: int) -> bool:
        """Hand over a connection, by the number of its descriptor; return whether it is held now."""
        if number >= NUM_CONNECTIONS:
            return False
        self.states[number] = IDLE
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", number))
        try:
            self._line.sendmsg([NUMBER.pack(number)], [rights])
        except OSError:  # it has more to do than it can, or is gone: the connection goes on without
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
    """One connection, which a guardian holds too; in its scope's extension an application says that it streams, and writes to it."""

    guardian: ClassVar[Guardian | None] = None
    _held: int | None = None
    """This connection's number, where the guardian holds it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Hand the connection over: a request may come with which this process never gets to work."""
        super().connection_made(transport)
        self._hand_over()

    def on_message_begin(self) -> None:
        """Have what begins to come answered, whatever it asks."""
        super().on_message_begin()
        if self._held is None:  # the guardian was too busy before
            self._hand_over()
        if self._is_free():
            self._set_state(ASKED)

    def on_headers_complete(self) -> None:
        """Hand the request on with one id, and with our word, and not its client's, of whether Ray Serve watches that client."""
        given = [value for name, value in self.headers if name == ID_HEADER]
        self.headers[:] = [header for header in self.headers if header[0] not in (UNWATCHED[0], ID_HEADER)]
        self.headers.append((ID_HEADER, request_id_of(given[-1] if given else b"").encode()))  # Ray Serve says it again, as it came
        if self.guardian and not self.guardian.may_wait():  # the engine's application itself looks whether its client is still there
            self.headers.append(UNWATCHED)
        before, is_first = self.cycle, self._is_free()
        super().on_headers_complete()
        cycle = self.cycle
        if self.guardian is None or cycle is before:
            return
        place = self.guardian.place(self.scope["path"])
        extension: dict[str, Any] = {"send_piece": partial(self._send_piece, cycle)}
        if place != ASKED:
            extension["begin_stream"] = partial(self._begin_stream, cycle, place + 1)
        self.scope["extensions"] = {EXTENSION: extension}  # type: ignore[dict-item]
        cycle.send = partial(self._send, cycle)  # type: ignore[method-assign, assignment]
        if is_first:  # else it waits behind another, whose answer may be under way
            self._set_state(place)

    def handle_websocket_upgrade(self) -> None:
        """Take the connection back, which from now on is another protocol's."""
        held, self._held = self._held, None
        if self.guardian and held is not None and not self.guardian.release(held):
            self.transport.close()
            return
        super().handle_websocket_upgrade()

    def _send(self, cycle: RequestResponseCycle, message: Message) -> Awaitable[None]:
        """Send a message of an answer; when its head is under way, no other answer can follow."""
        if message["type"] == "http.response.start":
            self._set_state(BEGUN)
        return RequestResponseCycle.send(cycle, message)  # type: ignore[arg-type]

    def _begin_stream(self, cycle: RequestResponseCycle, place: int) -> None:
        """Have the answer, whose head was sent, ended with an event if this process dies before it can end it."""
        if cycle is self.cycle and cycle.chunked_encoding and not cycle.response_complete:
            self._set_state(place)

    def _send_piece(self, cycle: RequestResponseCycle, message: Message) -> Awaitable[None]:
        """Send a piece, neither first nor last, of an answer: uvicorn's `send`, without what is only of the others."""
        if not cycle.chunked_encoding or cycle.response_complete or cycle.disconnected or cycle.flow.write_paused:
            return cycle.send(message)  # type: ignore[arg-type]
        body = message["body"]
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return send_nothing()

    def on_response_complete(self) -> None:
        """Take note that nothing is under way, unless the rest of a request that was answered early; the connection may get the next."""
        self._set_state(BEGUN if self.cycle.more_body else IDLE)
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """Take note that a request is there as a whole, where it was answered before."""
        super().on_message_complete()
        if self._is_free():
            self._set_state(IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection for the guardian too, whether or not it can be told."""
        connection = socket.socket(fileno=self.transport.get_extra_info("socket").fileno())  # open until this method is left
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.detach()
        self._set_state(BEGUN)  # what its client sent and nobody read is not to be answered
        if self.guardian and self._held is not None:
            self.guardian.release(self._held)
        super().connection_lost(exc)

    def _hand_over(self) -> None:
        number = self.transport.get_extra_info("socket").fileno()
        if self.guardian and self.guardian.hold(number):
            self._held = number

    def _is_free(self) -> bool:
        """Whether no answer is under way, nor waits to be."""
        return self.cycle is None or self.cycle.response_complete

    def _set_state(self, state: int) -> None:
        if self.guardian and self._held is not None:
            self.guardian.states[self._held] = state


def guard_connections(may_wait: Callable[[], bool], words: Mapping[str, LastWords], other: bytes) -> None:
    """Start a guardian, and have uvicorn's servers of this process from now on use it; without one, what is under way breaks off as ever.

    What it says on a connection is in `words`, by the request's path; `other` answers where the path is none of these, or was not read yet.

    `may_wait` tells whether a request may wait long before the engine's application has it: then Ray Serve looks whether it is given up.
    """
    try:
        GuardedProtocol.guardian = Guardian(may_wait, words, other)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("what is under way will break off where this engine is killed: %s", error)
        return
    HTTP_PROTOCOLS["auto"] = GuardedProtocol  # type: ignore[assignment]


def stream_beginner(scope: Scope) -> Callable[[], None] | None:
    """Return what is to be called when the head of a stream was sent; None where nothing ends it."""
    begin: Callable[[], None] | None = _extension(scope).get("begin_stream")
    return begin


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
