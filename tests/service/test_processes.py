"""The process itself: how it starts and stops, one or several, and what it answers while servers are away or hang."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from config.settings import Settings
from tests.support.ledger import give_account
from tests.support.paths import ROOT
from tests.support.resources import settings_for
from tests.support.serving import Served, serving
from tests.support.waiting import wait_until
from tests.support.web import free_port, got
from worker.demo.processes import children_of
from worker.demo.servers import Server

USER, METER = "user-42", "premium_voice"
WHO = {"user_id": USER, "meter": METER}


@pytest.fixture
def settings(database_url: str, own_redis: Server) -> Iterator[Settings]:
    """Settings for a Redis that the test may stop."""
    own_redis.start()
    made = settings_for(database_url, own_redis.url, api_key_unknown_pause_ms=0, redis_retries=0)
    give_account(made, USER, "basic")
    yield made
    own_redis.start()
