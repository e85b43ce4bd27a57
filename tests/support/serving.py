"""`meterfall serve` as a process of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.settings import PREFIX, Settings, variable_name
from schemas.codes import Role
from tests.support.paths import ROOT
from tests.support.resources import worker_resources
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.admin import api_keys
from worker.process import on_launcher_death

START_SECONDS = 60


@dataclass(frozen=True)
class Reply:
    """A response that arrived whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> Any:
        """The problem document of an error, whose status is that of the response."""
        assert self.headers["content-type"] == "application/problem+json", self
        found = json.loads(self.body)
        assert found["status"] == self.status
        assert found["type"].startswith("urn:meterfall:")
        assert "Traceback" not in self.body.decode()
        return found


@dataclass
class Served:
    """A running service; `secrets` are its API keys, by role."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    secrets: dict[str, str] = field(default_factory=dict)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        role: str | None = "operator",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request, by the key of a role, and read its response. Bytes are sent as they are."""
        sent = dict(headers or {})
        if role is not None:
            sent.setdefault("Authorization", f"Bearer {self.secrets.get(role, role)}")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None and not isinstance(body, bytes):
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, named, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: object, role: str | None = "producer", **headers: str) -> Reply:
        """Send a POST with a body as JSON; names of headers with `_` for `-`."""
        return self.ask("POST", path, body, role, {name.replace("_", "-"): value for name, value in headers.items()})

    def get(self, path: str, role: str | None = "reader") -> Reply:
        """Send a GET."""
        return self.ask("GET", path, None, role)

    def logged(self) -> str:
        """What the service has logged so far."""
        return self.log.read_text(encoding="utf-8")


def make_keys(settings: Settings) -> dict[str, str]:
    """Make an API key of each role; returns their secrets."""
    with worker_resources(settings) as resources:
        return {role.value: api_keys.add(resources, f"the-{role.value}", role, actor="tests").secret for role in Role}


@contextmanager
def serving(
    settings: Settings, folder: Path, *options: str, keys: bool = True, variables: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Run `meterfall serve` with these settings. At the end of the block it stops, and its log is printed."""
    port, log = free_port(), folder / "serve.log"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environ |= {variable_name(each): str(getattr(settings, each)) for each in settings.model_fields_set}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "serve", "--port", str(port), *options],
            cwd=ROOT,
            env={**environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=on_launcher_death(signal.SIGKILL),
        )
    try:
        secrets = make_keys(settings) if keys else {}
        wait_until(
            lambda: process.poll() is not None or got(port, "/live")[0] == 200, "the service answers", START_SECONDS
        )
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield Served(port, process, log, secrets)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(f"--- serve: {process.returncode}\n{log.read_text(encoding='utf-8')}")
