"""The process that speaks for a replica which was killed: it holds its connections, ends their streams, and answers who waits.

A connection stays open while another process holds it too. Begun by `serve.last_words` as a file of its own, with the socket that it is
told things by as its input, its output a table in shared memory, and the words as its arguments; knows sockets and the standard library
alone, so that it starts at once and stays small.
"""

import mmap
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from fcntl import ioctl

NUMBER = struct.Struct("=I")  # the connection's in the replica
NUM_CONNECTIONS = 2**16  # by their numbers; each has a byte in the table: the place of what is to be said on it among the words
IDLE, BEGUN, ASKED = 0, 1, 2  # no request is under way, or one that nobody has read; an answer that no words can end; a request
MAX_TOLD_BYTES = 64
SIOCINQ, SIOCOUTQ = 0x541B, 0x5411
MAX_UNREAD_BYTES = 2**16  # with so much on the way the reader stands still, and the replica may have written half a chunk
LINGER_S = 1.0


def main() -> None:
    """Hold what is handed over, let go what is taken back, and when nobody is left to tell, say the last words."""
    words = [bytes.fromhex(each) for each in sys.argv[1:]]
    states = mmap.mmap(1, NUM_CONNECTIONS)
    if os.fork():
        os._exit(0)  # no child of the replica: Ray kills those first
    for ended in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ended, signal.SIG_IGN)  # it ends with its replica, and after it
    held: dict[int, socket.socket] = {}
    with socket.socket(fileno=0) as line:
        while told := socket.recv_fds(line, MAX_TOLD_BYTES, 1):
            message, descriptors, *_ = told
            if not message:
                break
            (number,) = NUMBER.unpack(message)
            if before := held.pop(number, None):
                before.close()
            for descriptor in descriptors:
                held[number] = socket.socket(fileno=descriptor)
    spoken = [connection for number, connection in held.items() if speak(connection, states[number], words)]
    until = time.monotonic() + LINGER_S
    for connection in spoken:
        end(connection, until)


def speak(connection: socket.socket, state: int, words: list[bytes]) -> bool:
    """Say the last words, where there is something to say and it can begin; else close the connection, and return False."""
    with suppress(OSError):
        is_asked = state != IDLE or _num_bytes(connection, SIOCINQ) > 0
        if is_asked and state != BEGUN and _num_bytes(connection, SIOCOUTQ) <= MAX_UNREAD_BYTES:
            connection.send(words[state], socket.MSG_DONTWAIT)
            connection.shutdown(socket.SHUT_WR)
            return True
    connection.close()
    return False


def end(connection: socket.socket, until: float) -> None:
    """Close a connection when the other side has, or at a time: what is closed with something unread is reset, and loses what was said."""
    with connection, suppress(OSError):
        while (left_s := until - time.monotonic()) > 0:
            connection.settimeout(left_s)
            if not connection.recv(MAX_UNREAD_BYTES):
                break


def _num_bytes(connection: socket.socket, which: int) -> int:
    number: int = struct.unpack("i", ioctl(connection.fileno(), which, b"\0" * 4))[0]
    return number


if __name__ == "__main__":
    main()
