"""Faults of the configuration that Redis names, each in one line: waiting mends none of them."""

from __future__ import annotations

import re

from redis import exceptions
from redis.connection import parse_url

from config.log import without_arguments
from config.settings import Settings, without_secrets

# What each code means. redis-py takes the code off the text of those that it knows.
_KINDS = (
    ("NOAUTH", "authentication required", "it wants a user and a password (NOAUTH)"),
    ("WRONGPASS", "invalid username-password pair", "wrong user or password (WRONGPASS)"),
    ("NOPERM", "permission", "the user {user} lacks a right (NOPERM)"),
    ("ERR invalid DB index", "DB index is out of range", "no such database"),
)


def fault_of(
    error: BaseException, settings: Settings, *, command: str = "", role: str = "", of_queue: bool = False
) -> str | None:
    """Return the fault of the configuration that `error` is, in one line; None if it is an outage, or none of this.

    `command` and the `role` that it needs are named where a right is missing. `of_queue`: the Redis of the queue, which
    may be another one, raised the error.
    """
    is_other = of_queue and settings.queue_redis_url is not None
    variable, url = ("METERFALL_QUEUE_REDIS_URL", settings.queue_url) if is_other else ("REDIS_URL", settings.redis_url)
    while isinstance(error, exceptions.ConnectionError) and isinstance(error.__cause__, exceptions.RedisError):
        error = error.__cause__  # redis-py puts what a new connection was refused for into another error
    text = " ".join(str(error).split())
    if isinstance(error, exceptions.ConnectionError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return f"{variable}: {text}; METERFALL_REDIS_TLS names what to believe"
    if not isinstance(error, exceptions.AuthenticationError | exceptions.ResponseError):
        return None
    refused = isinstance(error, exceptions.AuthenticationError | exceptions.NoPermissionError)
    kind = next((kind for kind in _KINDS if text.startswith(kind[0]) or kind[1].lower() in text.lower()), None)
    if kind is None and not refused:
        return None
    lacks_right = kind is not None and kind[0] == "NOPERM"
    if lacks_right:
        text = _lacked_in(text)
    reason = f"{kind[2].format(user=_user_of(url))}: {text}" if kind else text
    needs = f": `meterfall {command}` needs the role {role}" if lacks_right and command and role else ""
    return f"{variable}: {without_secrets(url)} refuses us: {reason}{needs}"


def _user_of(url: str) -> str:
    return f"`{parse_url(url).get('username') or 'default'}`"


def _lacked_in(text: str) -> str:
    """Say which command or key Redis denied, without user data: redis-py quotes the command of a pipeline."""
    sent = re.match(r"Command # \d+ \((\S+)", text)
    text = without_arguments(text)
    if denied := re.search(r"to run the '([\w|]+)' command", text):
        script = ", in a script" if "script" in text else ""
        return f"it may not run {denied[1].upper()}{script}"
    return f"{text}, in {sent[1]}" if sent else text
