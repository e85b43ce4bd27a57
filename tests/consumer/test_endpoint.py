"""What a dyno tells over HTTP."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import closing
from time import monotonic

from redis import Redis

from config.settings import Settings
from tests.support.processes import dyno
from tests.support.resources import settings_for
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.demo.servers import Server


def test_a_dyno_is_live_and_ready_and_tells_what_failed(settings: Settings, own_redis: Server) -> None:
    own_redis.start()
    port = free_port()
    settings = settings_for(settings.database_url or "", own_redis.url)
    with dyno(settings, METERFALL_HTTP_PORT=str(port)) as running:
        wait_until(lambda: got(port, "/ready")[0] == 200, "the dyno is ready", seconds=30)
        assert "redis" not in json.loads(got(port, "/ready")[1])["failed"]
        assert got(port, "/live") == (200, '{"live": true}\n')
        assert 'meterfall_server_up{server="redis"} 1.0' in got(port, "/metrics")[1]
        assert got(port, "/other")[0] == 404
        own_redis.kill()
        try:
            wait_until(lambda: got(port, "/ready")[0] == 503, "Redis is away", seconds=10)
            began = monotonic()
            assert "redis" in json.loads(got(port, "/ready")[1])["failed"]
            assert 'meterfall_server_up{server="redis"} 0.0' in got(port, "/metrics")[1]
            assert monotonic() - began < 2
            assert got(port, "/live")[0] == 200
        finally:
            own_redis.start()
        wait_until(lambda: got(port, "/ready")[0] == 200, "it is ready again", seconds=30)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
    assert got(port, "/live")[0] == 0


def test_a_port_in_use_is_one_line_and_the_dyno_works(settings: Settings, redis: Redis) -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        dyno(settings, "--burst", METERFALL_HTTP_PORT=str(taken.getsockname()[1])) as running,
    ):
        _, errors = running.communicate(timeout=30)
    assert running.returncode == 0
    assert errors.count("METERFALL_HTTP_PORT: no endpoint on 127.0.0.1:") == 1
