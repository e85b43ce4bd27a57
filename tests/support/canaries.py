"""Canaries of what no log and no report may tell: a user, a password, a payload."""

from __future__ import annotations

from redis import Redis

from config.settings import Settings
from tests.support.resources import settings_for
from worker.demo.servers import Server

USER, PASSWORD, PAYLOAD = "canary-user", "canary-password", "canary-payload"


def settings_with_passwords(database_url: str, own_redis: Server, **overrides: object) -> Settings:
    """Return settings whose URLs carry passwords, on an empty Redis that the test may stop."""
    own_redis.start()
    with Redis.from_url(own_redis.url) as redis:
        redis.flushall()
    redis_url = own_redis.url.replace("unix://", f"unix://default:{PASSWORD}@")
    separator = "&" if "?" in database_url else "?"
    return settings_for(f"{database_url}{separator}password={PASSWORD}", redis_url, **overrides)
