"""Logging: one loguru sink on stderr, one line per message, without personal data.

More people read logs than the ledger. So logs name a user by a hash, and an error by its kind and code: messages of
Postgres and redis-py quote rows, arguments and keys. Ids of events, holds and stream entries appear in full.
"""

from __future__ import annotations

import logging
import re
import sys
from hashlib import sha256
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal

from redis.exceptions import RedisError

HASH_DIGITS = 12
# SQLSTATEs with messages that quote values: data exceptions, and errors raised by triggers.
_QUOTING_CLASSES = ("22", "P0")


def configure_logging(level: str) -> None:
    """Log from `level` upwards to stderr. Tracebacks omit local values, which hold user data."""
    from loguru import logger  # services log with the standard library alone

    logger.remove()
    logger.add(
        sys.stderr,
        level=level,
        format="{time:YYYY-MM-DDTHH:mm:ss.SSSZ} {level:<7} {message}",
        backtrace=False,
        diagnose=False,
    )


def name_in_logs(user_id: str, mode: Literal["hashed", "plain"]) -> str:
    """Return a user's name in logs: the first digits of the SHA-256 of the id, or the id itself.

    A reader who knows the id finds its lines; a reader of the log alone must guess ids. The hash has no key, so all
    services and workers print the same name, and so does `printf %s <id> | sha256sum`.
    """
    return user_id if mode == "plain" else f"user:{sha256(user_id.encode()).hexdigest()[:HASH_DIGITS]}"


def described(error: BaseException) -> str:
    """Describe an error in one line without user data: its kind, and its code and message if they are safe."""
    if inner := getattr(error, "orig", None):  # SQLAlchemy wraps what psycopg raises
        error = inner
    name = type(error).__name__
    if sqlstate := getattr(error, "sqlstate", None):
        diagnosis: Any = getattr(error, "diag", None)
        message = None if sqlstate.startswith(_QUOTING_CLASSES) else diagnosis.message_primary
        return f"{name}: {sqlstate}{f' {message}' if message else ''}"
    if isinstance(error, RedisError):
        return f"{name}: {_without_arguments(str(error))}"
    if name == "OperationalError":  # libpq could not connect, or lost the connection
        return f"{name}: {' '.join(str(error).split())}"
    if isinstance(error, OSError):
        return f"{name}: {error.strerror}"
    if error.__cause__ is not None:
        return f"{name}: {described(error.__cause__)}"
    frames = extract_tb(error.__traceback__)
    return f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else name


def _without_arguments(text: str) -> str:
    """Strip a Redis error of the command that redis-py quotes, and of the part of a key that names a user."""
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: ", "", text, flags=re.DOTALL)
    text = text.partition(", with args beginning with")[0]
    return re.sub(r"(\{\w+\}:[a-z-]+):[^\s']+", r"\1:…", " ".join(text.split()))


class _ErrorsDescribed(logging.Filter):
    """Replace errors among the arguments of a log line by their description, which quotes no data."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(described(arg) if isinstance(arg, BaseException) else arg for arg in record.args)
        return True


# The logger of the client. The service chooses handlers and level.
client_logger = logging.getLogger("meterfall")
client_logger.addFilter(_ErrorsDescribed())
