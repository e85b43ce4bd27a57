"""A web service as a process of its own, behind a Unix socket, and listeners that hang up when a test says so."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.settings import PREFIX, Settings, variable_name
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from worker.process import on_launcher_death

START_SECONDS = 30


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return int(taken.getsockname()[1])


def got(port: int, path: str) -> tuple[int, str]:
    """Code and body that a port of loopback answers; code 0 if none does within a few seconds."""
    return requested(port, "GET", path, timeout_seconds=5)


def requested(
    port: int,
    method: str,
    path: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 30,
) -> tuple[int, str]:
    """Code and body that a port of loopback answers to a request; code 0 without an answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)) as connection:
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""


class Listener(http.client.HTTPConnection):
    """One connection of a client. Raises http.client.IncompleteRead for a response that was cut off."""

    def __init__(self, address: Path) -> None:
        super().__init__("service", timeout=30)
        self._address = address

    def connect(self) -> None:
        """Connect to the socket of the service."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._address))

    def hang_up(self) -> None:
        """End the connection without a word, whatever is still to come."""
        if self.sock is not None:  # else it has ended already
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.close()


@dataclass(frozen=True)
class Answer:
    """A response that arrived whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def problem(self) -> Any:
        """The problem document of an error."""
        assert self.headers["content-type"] == "application/problem+json"
        return json.loads(self.body)


@dataclass
class WebService:
    """A running service."""

    address: Path
    process: subprocess.Popen[bytes]

    def call(self, method: str, path: str, body: object = None, **headers: str) -> Listener:
        """Send a request; the response is not read yet."""
        listener = Listener(self.address)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named["content-type"] = "application/json"
        try:
            listener.request(method, path, None if body is None else json.dumps(body), named)
        except OSError:
            listener.close()
            raise
        return listener

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Send a request and read its whole response."""
        listener = self.call(method, path, body, **headers)
        try:
            response = listener.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read())
        finally:
            listener.close()

    def kill(self) -> None:
        """Kill the process; it has no time for anything."""
        self.process.kill()
        self.process.wait()


@contextmanager
def web_service(
    app: str,
    settings: Settings,
    folder: Path,
    name: str = "service",
    python: str = sys.executable,
    code: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[WebService]:
    """Run `uvicorn app` with these settings and variables, in the folder of its code.

    At the end of the block it stops, and its log is printed.
    """
    address, log = folder / f"{name}.sock", folder / f"{name}.log"
    address.unlink(missing_ok=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environ |= {variable_name(each): str(getattr(settings, each)) for each in settings.model_fields_set}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "uvicorn", app, "--uds", str(address), "--no-access-log"],
            cwd=code,
            env={**environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=on_launcher_death(signal.SIGKILL),
        )
    try:
        wait_until(lambda: process.poll() is not None or _answers(address), "the service answers", START_SECONDS)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield WebService(address, process)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(f"--- {app}: {process.returncode}\n{log.read_text(encoding='utf-8')}")


def _answers(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.connect(str(address))
        return True
    return False
