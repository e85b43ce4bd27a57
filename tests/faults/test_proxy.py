"""The proxy itself: it passes bytes, loses the right ones, and reports that."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingUnixStreamServer
from threading import Thread

import pytest

from tests.support.proxy import Proxy


@pytest.fixture
def heard() -> list[bytes]:
    """The bytes that the server received."""
    return []


@pytest.fixture
def proxy(tmp_path: Path, heard: list[bytes]) -> Iterator[Proxy]:
    """A proxy before a server that answers in capitals."""

    class Loud(BaseRequestHandler):
        """Echoes its input in capitals."""

        def handle(self) -> None:
            while text := self.request.recv(1_024):
                heard.append(text)
                self.request.sendall(text.upper())

    with ThreadingUnixStreamServer(str(tmp_path / "s"), Loud) as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        with Proxy(tmp_path / "s") as opened:
            yield opened
        server.shutdown()
        thread.join()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def test_everything_goes_through(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        for client, text in ((one, b"a"), (other, b"b"), (one, b"c")):
            client.sendall(text)
            assert client.recv(10) == text.upper()


def test_the_reply_to_one_request_is_lost_with_its_connection(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        lost = proxy.lose_reply(b"commit", reply=b"COMMIT")
        for client in (one, other):
            client.sendall(b"begin")
            assert client.recv(10) == b"BEGIN"
        assert not lost.is_set()
        one.sendall(b"com")
        assert one.recv(10) == b"COM"
        one.sendall(b"mit")
        assert not lost.wait(0.05), "the answer has not been whole yet: it said MIT"
        one.sendall(b"commit")
        assert one.recv(10) == b""
        assert lost.is_set()
        other.sendall(b"commit")
        assert other.recv(10) == b"COMMIT"


def test_a_client_whose_reply_is_lost_may_be_left_waiting(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        lost = proxy.lose_reply(b"commit", reply=b"COMMIT", cut=False)
        one.sendall(b"commit")
        assert lost.wait(10)
        one.sendall(b"again")
        one.settimeout(0.05)
        with pytest.raises(TimeoutError):
            one.recv(10)
        other.sendall(b"commit")
        assert other.recv(10) == b"COMMIT"


def test_a_request_is_torn_where_it_begins_for_the_nth_time(proxy: Proxy, heard: list[bytes]) -> None:
    with connect(proxy) as client:
        torn = proxy.tear(b"run", times=3)
        for text in (b"run 1, r", b"un 2"):
            client.sendall(text)
            assert client.recv(10) == text.upper(), "nothing is lost before the third"
        client.sendall(b", ru")
        assert client.recv(10) == b", RU"
        client.sendall(b"n 3")
        client.sendall(b", run 4")
        assert torn.wait(10)
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(10)
    assert b"".join(heard) == b"run 1, run 2, run"


def test_nothing_leaves_a_black_hole_and_nothing_is_closed_by_it(proxy: Proxy) -> None:
    with connect(proxy) as client:
        proxy.black_hole()
        client.sendall(b"a")
        with connect(proxy) as late:
            for waiting in (client, late):
                waiting.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    waiting.recv(10)
        proxy.forward()
        client.settimeout(10)
        assert client.recv(10) == b"A"


def test_a_cut_closes_what_is_open_and_lets_new_ones_in(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"a")
        assert client.recv(10) == b"A"
        proxy.cut()
        assert client.recv(10) == b""
    with connect(proxy) as client:
        client.sendall(b"b")
        assert client.recv(10) == b"B"


def test_where_the_server_is_down_the_connection_is_closed(tmp_path: Path) -> None:
    with Proxy(tmp_path / "nobody") as proxy, connect(proxy) as client:
        assert client.recv(10) == b""
