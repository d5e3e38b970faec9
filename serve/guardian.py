"""The process that speaks for a replica which was killed: it holds the connections of streams that are under way, and ends them.

A connection stays open while another process holds it too. Begun by `serve.last_words` as a file of its own, with the socket that it is
told things by as its input, and its output a table in shared memory; knows sockets and the standard library alone, so that it starts
at once and stays small.
"""

import mmap
import os
import signal
import socket
import struct
from contextlib import suppress
from fcntl import ioctl

NUMBER = struct.Struct("=I")  # the connection's in the replica; what it is told stands behind it, where it is handed over
NUM_CONNECTIONS = 2**16  # by their numbers; each has a byte in the table, which is 1 while a stream is under way on it
MAX_TOLD_BYTES = 4096
SIOCOUTQ = 0x5411
MAX_UNREAD_BYTES = 2**16  # with so much on the way the reader stands still, and the replica may have written half a chunk


def main() -> None:
    """Hold what is handed over, let go what is taken back, and when nobody is left to tell, say the last words."""
    streams = mmap.mmap(1, NUM_CONNECTIONS)
    if os.fork():
        os._exit(0)  # no child of the replica: Ray kills those first
    for ended in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ended, signal.SIG_IGN)  # it ends with its replica, and after it
    held: dict[int, tuple[socket.socket, bytes]] = {}
    with socket.socket(fileno=0) as line:
        while told := socket.recv_fds(line, MAX_TOLD_BYTES, 1):
            message, descriptors, *_ = told
            if not message:
                break
            (number,) = NUMBER.unpack_from(message)
            if before := held.pop(number, None):
                before[0].close()
            for descriptor in descriptors:
                held[number] = (socket.socket(fileno=descriptor), message[NUMBER.size :])
    for number, (connection, words) in held.items():
        with suppress(OSError):
            if streams[number]:
                speak(connection, words)
        connection.close()


def speak(connection: socket.socket, words: bytes) -> None:
    """Say the last words, where they can begin a chunk of their own."""
    unread = struct.unpack("i", ioctl(connection.fileno(), SIOCOUTQ, b"\0" * 4))[0]
    if unread <= MAX_UNREAD_BYTES:
        connection.send(words, socket.MSG_DONTWAIT)


if __name__ == "__main__":
    main()
