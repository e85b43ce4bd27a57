"""A TCP proxy on loopback in front of a server's Unix socket, which loses replies, cuts connections or swallows all.

Whoever goes through it sees a network: what it does wrong happens at a place that the test names, not at a moment that
it has to guess.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread

_CHUNK_BYTES = 65_536


@dataclass
class LostReply:
    """The reply that is to be lost. `lost` is set once the server has answered and the answer was thrown away.

    It answers the `times`-th `request` of one connection. If `torn`, the server gets nothing after those bytes. Unless
    `cut`, the connection stays open and silent.
    """

    request: bytes
    reply: bytes = b""
    times: int = 1
    torn: bool = False
    cut: bool = True
    lost: Event = field(default_factory=Event)


class _Seen:
    """Tells whether some bytes have gone by `times`, however they were cut into packets."""

    def __init__(self, wanted: bytes, times: int = 1) -> None:
        self._wanted = wanted
        self._missing = times
        self._tail = b""

    def end_in(self, chunk: bytes) -> int | None:
        """Offset after the wanted bytes in the next chunk, None if they do not end there; 0 if none are wanted."""
        text, end = self._tail + chunk, 0
        while (start := text.find(self._wanted, end)) >= 0:
            end = start + len(self._wanted)
            self._missing -= 1
            if self._missing <= 0:
                return end - len(self._tail)
        self._tail = text[max(end, len(text) - len(self._wanted) + 1) :]
        return None


class _Connection:
    """One client and its connection to the server: two threads, one for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (client, server)
        self._muted: LostReply | None = None
        self._threads = [Thread(target=self._carry_requests), Thread(target=self._carry_replies)]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """Close both ends, as a network that goes away; the threads end by it."""
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def is_over(self) -> bool:
        """True when neither direction carries anything any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Cut, wait for the threads, and give the sockets back."""
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _carry_requests(self) -> None:
        client, server = self._sockets
        planned, seen = None, _Seen(b"")
        for chunk in _chunks(client):
            if not self._proxy.open.is_set():
                self._proxy.open.wait()
                # All of it at once: an answer to the first part would meet a client that is gone, and undo the rest.
                chunk += _what_waits(client)
            if self._proxy.reply_to_lose is not planned:
                planned = self._proxy.reply_to_lose
                seen = _Seen(planned.request, planned.times) if planned else _Seen(b"")
            end = seen.end_in(chunk) if planned else None
            if planned and end is not None and self._proxy.claim(planned):
                self._muted = planned  # before it is forwarded: the answer must not be faster
                if planned.torn:
                    self._forward(chunk[:end], server)
                    for _ in _chunks(client):
                        pass
                    break
            self._forward(chunk, server)
        self.cut()

    def _carry_replies(self) -> None:
        client, server = self._sockets
        muted, seen = None, _Seen(b"")
        for chunk in _chunks(server):
            if self._muted is not muted:
                muted = self._muted
                seen = _Seen(muted.reply if muted else b"")
            if muted is None:
                self._forward(chunk, client)
            elif seen.end_in(chunk) is not None:
                muted.lost.set()
                if muted.cut:
                    break
        self.cut()

    def _forward(self, chunk: bytes, to: socket.socket) -> None:
        self._proxy.open.wait()
        with suppress(OSError):
            to.sendall(chunk)


class Proxy:
    """Forwards everything until it is told otherwise. Use it as a context manager: nothing of it is left."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self._lock = Lock()
        self._closing = False
        self.port: int = self._listener.getsockname()[1]
        self.reply_to_lose: LostReply | None = None
        self.open = Event()
        self.open.set()
        self._thread = Thread(target=self._accept)
        self._thread.start()

    def lose_reply(self, request: bytes, reply: bytes = b"", *, cut: bool = True) -> Event:
        """Forward the next request that contains `request`, throw its answer away, and cut the connection.

        The answer is taken for complete once it contains `reply`; by default its first bytes will do. Returns what is
        set when that has happened: a test that waits for it knows that the server did what it was asked to do. With
        `cut` false the client goes on waiting: the connection stays open, and nothing comes back on it any more.
        """
        self.reply_to_lose = LostReply(request, reply, cut=cut)
        return self.reply_to_lose.lost

    def tear(self, request: bytes, times: int) -> Event:
        """Forward what a client sends up to the end of its `times`-th `request`, and nothing after it.

        From then on the connection stays open and silent. Returns what is set when the server has answered what it got:
        the requests before the torn one, which must come in one packet with it.
        """
        self.reply_to_lose = LostReply(request, times=times, torn=True, cut=False)
        return self.reply_to_lose.lost

    def black_hole(self) -> None:
        """From now on nothing gets through, in either direction, and no connection is closed; new ones are taken."""
        self.open.clear()

    def forward(self) -> None:
        """Let everything through again, also what was held back."""
        self.open.set()

    def cut(self) -> None:
        """Close every connection; new ones are taken."""
        with self._lock:
            for connection in self._connections:
                connection.cut()

    def claim(self, planned: LostReply) -> bool:
        """True for the one connection that has met the request whose reply is to be lost."""
        with self._lock:
            if self.reply_to_lose is not planned:
                return False
            self.reply_to_lose = None
            return True

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.forward()
        self._closing = True
        # Closing the listener would leave `accept` waiting.
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closing:
                client.close()
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._target))
            except OSError:  # the server is down: so is the way to it
                client.close()
                server.close()
                continue
            with self._lock:
                for over in [each for each in self._connections if each.is_over()]:
                    over.close()
                    self._connections.remove(over)
                self._connections.append(_Connection(self, client, server))


def _what_waits(source: socket.socket) -> bytes:
    """What has come in already."""
    found = b""
    with suppress(OSError):
        while more := source.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT):
            found += more
    return found


def _chunks(source: socket.socket) -> Iterator[bytes]:
    """What comes in, until the connection ends, however it ends."""
    with suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            yield chunk
