"""The receiver in examples/webhook_receiver: it takes what is signed, tops up once, and stands restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from redis import Redis
from standardwebhooks import Webhook

from config.settings import Settings
from distributions.client import build
from tests.support.ledger import give_account, rows
from tests.support.paths import ROOT
from tests.support.resources import settings_for
from tests.support.streams import drain
from worker.admin import accounts, notices, webhooks
from worker.client import Billing
from worker.consumer.notices import send_notices
from worker.process import on_launcher_death
from worker.resources import Resources

USER, METER = "user-42", "premium_voice"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package `meterfall`, as it is in the wheel."""
    stage = tmp_path_factory.mktemp("wheel")
    build.lay_out(stage)
    return stage


@pytest.fixture
def settings(emptied_database_url: str, redis_url: str) -> Settings:
    return settings_for(
        emptied_database_url, redis_url, webhook_private_addresses=True, webhook_retry_seconds=0.1,
        webhook_timeout_ms=5_000,
    )  # fmt: skip


@contextmanager
def running(settings: Settings, wheel: Path, secret: str, port: int = 0) -> Iterator[int]:
    """Run the example; yield the port that it listens on."""
    environ = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(wheel), "WEBHOOK_SECRETS": f"whsec_{'A' * 44} {secret}",
        "DATABASE_URL": str(settings.database_url), "REDIS_URL": settings.redis_url, "PORT": str(port),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "receiver.py"],
        cwd=ROOT / "examples" / "webhook_receiver",
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=on_launcher_death(signal.SIGKILL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listens on port ")
        yield int(line.rpartition(" ")[2])
    finally:
        process.kill()
        process.communicate(timeout=10)


def answer(port: int, body: str, headers: dict[str, str]) -> int:
    """The status that the receiver answers."""
    request = Request(f"http://127.0.0.1:{port}/", body.encode(), headers, method="POST")
    try:
        with urlopen(request, timeout=10) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code


def test_a_line_that_is_reached_is_topped_up_once(
    settings: Settings, redis: Redis, resources: Resources, wheel: Path
) -> None:
    give_account(settings, USER, "basic")
    notices.set_rules(resources, USER, [{"kind": "balance.threshold", "left": 1_000, "top_up": 5_000}])
    added = webhooks.add(resources, "http://127.0.0.1:9/")  # the receiver needs the secret before it has a port
    with running(settings, wheel, added.secret) as port:
        with resources.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE webhook SET url = %s", (f"http://127.0.0.1:{port}/",))
        with Billing.connect(settings) as billing:
            billing.emit(USER, METER, 99_500, event_id="a")
        drain(settings, USER)
        stop_at = monotonic() + 30
        while rows(settings, "SELECT 1 FROM notice_delivery WHERE state = 'delivered'") == []:
            assert monotonic() < stop_at
            send_notices(resources, monotonic() + 1)
        assert accounts.show(resources, USER).balances[METER].purchased == 5_000
        (notice,) = notices.feed(resources).notices
        body = json.dumps(notice.model_dump(mode="json", exclude_none=True, exclude={"cursor"}))
        now = datetime.now(UTC)
        headers = {
            "webhook-id": notice.data.notice_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(added.secret).sign(notice.data.notice_id, now, body),
        }
        assert answer(port, body, headers) == 204, "a repeat is taken"
        assert accounts.show(resources, USER).balances[METER].purchased == 5_000, "and grants nothing"
        assert answer(port, body.replace("5000", "9000"), headers) == 401
        assert answer(port, body, {**headers, "webhook-timestamp": "1700000000"}) == 401
        assert answer(port, body, {}) == 401
        assert answer(port, "x" * 70_000, headers) == 413
    assert rows(settings, "SELECT count(*) FROM ledger_entry WHERE kind = 'grant'") == [(1,)]
