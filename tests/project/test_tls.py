"""Both servers behind TLS: certificates named in the URLs are trusted, nothing else is.

A server that was built without TLS stands behind a terminator, as one would put it into production.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from threading import Thread, Timer
from typing import NamedTuple

import psycopg
import pytest

from config.settings import Settings
from tests.support.ledger import give_account, rows
from tests.support.processes import dyno
from tests.support.resources import settings_for
from tests.support.web import free_port
from worker.client import AsyncBilling, Billing
from worker.demo.servers import (
    Binary,
    Server,
    ServerStartError,
    postgres_binaries,
    postgres_server,
    redis_binaries,
    redis_server,
)
from worker.errors import LedgerUnavailable, RedisUnavailable
from worker.keyspace.connection import connect
from worker.ledger.migrate import migrate

USER, METER = "user-42", "premium_voice"
_POSTGRES, _REDIS = list(postgres_binaries(os.environ)), list(redis_binaries(os.environ))
PAIRS = [(postgres or _POSTGRES[-1], redis or _REDIS[-1]) for postgres, redis in zip_longest(_POSTGRES, _REDIS)]
# What a Postgres client sends before TLS: "may I?"; the server answers S.
_SSL_REQUEST_BYTES = 8


class Certificate(NamedTuple):
    """A self-signed certificate for `localhost`, and its key."""

    file: Path
    key: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    made = Certificate(folder / "server.crt", folder / "server.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", str(made.file), "-keyout", str(made.key)]
    subprocess.run(command, check=True, capture_output=True)
    return made


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def terminator(certificate: Certificate, path: Path, *, asks_first: bool) -> Iterator[int]:
    """Ends TLS in front of a server on a socket file; yields the port. `asks_first`: as clients of Postgres do."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if asks_first:
                await reader.readexactly(_SSL_REQUEST_BYTES)
                writer.write(b"S")
                await writer.start_tls(context)
            inner_reader, inner_writer = await asyncio.open_unix_connection(str(path))
            try:
                await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
            finally:
                inner_writer.transport.abort()
                writer.transport.abort()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0, ssl=None if asks_first else context)

    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        # In the loop's own thread: there, a last connection may be ending just now.
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(_end_all())
        loop.close()


async def _end_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # the turn of the loop in which what they have aborted is closed


@contextmanager
def redis_behind_tls(binary: Binary, certificate: Certificate) -> Iterator[int]:
    port = free_port()
    names = {"tls-cert-file": certificate.file, "tls-key-file": certificate.key, "tls-ca-cert-file": certificate.file}
    options = {name: str(path) for name, path in names.items()}
    with ExitStack() as stack:
        try:
            listening = {"tls-port": str(port), "tls-auth-clients": "no", "bind": "127.0.0.1"}
            stack.enter_context(redis_server(binary, options=options | listening))
        except ServerStartError:
            plain = stack.enter_context(redis_server(binary))
            port = stack.enter_context(terminator(certificate, plain.folder / "redis.sock", asks_first=False))
        yield port


@contextmanager
def postgres_behind_tls(binary: Binary, certificate: Certificate) -> Iterator[tuple[Server, int]]:
    port = free_port()
    with postgres_server(binary, {"listen_addresses": "127.0.0.1", "port": str(port)}) as server, ExitStack() as stack:
        migrate(server.url)
        for path in certificate:  # their usual names, in their usual place
            copy = Path(shutil.copy(path, server.folder / "data"))
            copy.chmod(0o600)
            if server.account:
                shutil.chown(copy, server.account.pw_uid, server.account.pw_gid)
        with psycopg.connect(server.url, autocommit=True) as connection:
            try:
                connection.execute("ALTER SYSTEM SET ssl = on")
                connection.execute("SELECT pg_reload_conf()")
            except psycopg.errors.InvalidParameterValue:
                socket_file = server.folder / f".s.PGSQL.{port}"
                port = stack.enter_context(terminator(certificate, socket_file, asks_first=True))
        yield server, port


class Behind(NamedTuple):
    """Where both servers are behind TLS, and where Postgres is without."""

    certificate: Certificate
    redis_port: int
    postgres_port: int
    plain: str

    def settings(self, *, host: str = "localhost", trusted: bool = True, **overrides: object) -> Settings:
        redis_url = f"rediss://{host}:{self.redis_port}/0"
        database_url = f"postgresql://meterfall@{host}:{self.postgres_port}/meterfall?sslmode=verify-full"
        if trusted:
            redis_url += f"?ssl_ca_certs={self.certificate.file}"
            database_url += f"&sslrootcert={self.certificate.file}"
        return settings_for(database_url, redis_url, redis_retries=0, **overrides)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0].label}, {pair[1].label}")
def behind(request: pytest.FixtureRequest, certificate: Certificate) -> Iterator[Behind]:
    postgres, redis = request.param
    with (
        redis_behind_tls(redis, certificate) as redis_port,
        postgres_behind_tls(postgres, certificate) as (server, postgres_port),
    ):
        yield Behind(certificate, redis_port, postgres_port, server.url)


def test_services_and_workers_speak_tls_with_both_servers(behind: Behind) -> None:
    settings = behind.settings()
    give_account(settings, USER, "basic")
    with Billing.connect(settings) as billing:
        assert billing.check(USER, METER, 10).allowed
        billing.charge(USER, METER, 10, "e1")

    async def emit() -> None:
        async with AsyncBilling.connect(settings) as billing:
            await billing.emit(USER, METER, 5, event_id="e2")

    asyncio.run(emit())
    with dyno(settings, "--burst") as process:
        _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    plain = settings_for(behind.plain, "unix:///unused")
    assert rows(plain, "SELECT event_id, amount FROM usage_log ORDER BY seq") == [("e1", 10), ("e2", 5)]


def test_every_new_connection_is_usable_whatever_tls_sends_after_its_handshake(behind: Behind) -> None:
    for _ in range(30):
        with connect(behind.settings()) as client:
            assert client.time()


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "left to the loop"])
def test_a_loop_that_ends_leaves_no_connection_open(behind: Behind, closes: bool) -> None:
    """Although the server is slow to say goodbye, which a connection over TLS waits for."""
    settings = behind.settings()
    user = f"user-{closes}"
    give_account(settings, user, "basic")
    with connect(settings) as client:
        server = client.info("server")["process_id"]

    async def work() -> None:
        billing = AsyncBilling.connect(settings)
        assert (await billing.check(user, METER, 1)).allowed
        await billing.emit(user, METER, 1)
        os.kill(server, signal.SIGSTOP)
        Timer(0.1, os.kill, (server, signal.SIGCONT)).start()
        if closes:
            await billing.close()

    with warnings.catch_warnings(record=True, action="always") as warned:
        asyncio.run(work())
        gc.collect()
    messages = [str(each.message) for each in warned]
    assert [message for message in messages if message.startswith("unclosed")] == []


@pytest.mark.parametrize("way", ["file", "unverified"])
def test_a_redis_with_a_certificate_of_its_own_is_believed_by_setting(behind: Behind, way: str) -> None:
    """As Heroku's: the URL names no certificate, and for `unverified` not even the host that is in it."""
    redis_tls = str(behind.certificate.file) if way == "file" else way
    host = "localhost" if way == "file" else "127.0.0.1"
    trusted = behind.settings()
    settings = settings_for(trusted.database_url, f"rediss://{host}:{behind.redis_port}/0", redis_tls=redis_tls)
    give_account(trusted, f"user-{way}", "basic")
    with Billing.connect(settings) as billing:
        billing.emit(f"user-{way}", METER, 3)

    async def emit() -> None:
        async with AsyncBilling.connect(settings) as billing:
            await billing.emit(f"user-{way}", METER, 4)

    asyncio.run(emit())
    with dyno(settings, "--burst", METERFALL_REDIS_TLS=redis_tls) as process:
        _, output = process.communicate(timeout=30)
    assert process.returncode == 0, output
    plain = settings_for(behind.plain, "unix:///unused")
    assert rows(plain, f"SELECT sum(amount) FROM usage_log WHERE user_id = 'user-{way}'") == [(7,)]


@pytest.mark.parametrize("wrong", [{"trusted": False}, {"host": "127.0.0.1"}], ids=["unknown issuer", "another name"])
def test_a_certificate_that_does_not_fit_is_refused(behind: Behind, wrong: dict[str, object]) -> None:
    settings = behind.settings(**wrong)  # type: ignore[arg-type]
    with Billing.connect(settings) as billing:
        with pytest.raises(RedisUnavailable, match=r"(?i:certificate)"):
            billing.emit(USER, METER, 1)
        # Redis being away, the ledger is asked.
        with pytest.raises(LedgerUnavailable, match=r"(?i:certificate)"):
            billing.check(USER, METER, 1)
