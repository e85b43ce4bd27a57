"""The example in Node: its types come from the published document, it compiles, and it bills what it made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config.settings import Settings
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.serving import Served
from tests.support.streams import drain
from tests.support.waiting import wait_until
from tests.support.web import free_port, requested
from worker.process import on_launcher_death
from worker.service.openapi import FILE

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")

USER = "user-42"
TEXT = "Hello. And good bye."
INSTALL_SECONDS = 180


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed and compiled."""
    folder = tmp_path_factory.mktemp("node") / "node_service"
    shutil.copytree(ROOT / "examples" / "node_service", folder, ignore=shutil.ignore_patterns("node_modules", "dist"))
    run(folder, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund")
    run(folder, "npm", "run", "build")
    return folder


def run(folder: Path, *command: str) -> str:
    """Run a command to its end; return what it said. It must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OPENAPI": str(FILE)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def speaking(built: Path, served: Served, key: str) -> Iterator[int]:
    """Run the example with an API key; yields its port. At the end of the block it stops."""
    port = free_port()
    variables = {"METERFALL_URL": f"http://127.0.0.1:{served.port}", "METERFALL_KEY": key, "PORT": str(port)}
    process = subprocess.Popen(
        ["node", "dist/service.js"],
        cwd=built,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        preexec_fn=on_launcher_death(signal.SIGKILL),
    )
    try:
        wait_until(lambda: requested(port, "GET", "/")[0] == 400, "the example answers", 30)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def say(port: int, job: str, text: str = TEXT) -> tuple[int, str]:
    return requested(port, "POST", "/speech", text, {"X-User": USER, "Idempotency-Key": job})


def amounts(settings: Settings) -> dict[object, object]:
    return dict(rows(settings, "SELECT event_id, amount FROM usage_log"))  # type: ignore[arg-type]


def test_it_bills_each_job_once(built: Path, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic")
    with speaking(built, served, served.secrets["producer"]) as port:
        assert requested(port, "GET", "/", headers={"X-User": USER}) == (200, '{"available":100000}')
        status, sound = say(port, "job-1")
        assert (status, len(sound)) == (200, len(TEXT) * 100)
        assert say(port, "job-1")[0] == 409  # its hold is settled
        drain(settings, USER)
        assert amounts(settings) == {"job-1": len(TEXT)}
        assert requested(port, "GET", "/", headers={"X-User": USER}) == (200, f'{{"available":{100_000 - len(TEXT)}}}')


def test_it_refuses_what_the_user_cannot_pay(built: Path, served: Served, settings: Settings) -> None:
    give_account(settings, USER, "basic", buckets={"premium_voice": (99_990, 0, 0)})
    with speaking(built, served, served.secrets["producer"]) as port:
        status, told = say(port, "job-1")
    assert (status, "limit_exceeded" in told) == (402, True)


def test_it_says_that_billing_is_away_without_a_key(built: Path, served: Served) -> None:
    with speaking(built, served, "wrong") as port:
        assert say(port, "job-1")[0] == 503


def test_a_wrong_field_does_not_compile(built: Path, tmp_path: Path) -> None:
    """The types are those of the document, not `any`."""
    folder = tmp_path / "wrong"
    shutil.copytree(built, folder, symlinks=True)
    source = folder / "src" / "billing.ts"
    source.write_text(
        source.read_text(encoding="utf-8").replace("meter: METER, key, actual", "metre: METER, key, actual")
    )
    done = subprocess.run(["npx", "tsc"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode != 0, "'meter' is missing" in done.stdout) == (True, True), done.stdout
