"""Logging: one loguru sink on stderr, one line a message; and what a line may say.

Logs are read by more people than the ledger is. They tell users apart by a hash, and errors by their code and kind:
texts of Postgres and redis-py quote rows, arguments and keys. Ids of events, holds and entries are said as they are.
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
# SQLSTATEs whose message quotes values: data exceptions, and whatever a trigger of somebody else's has to say.
_QUOTING_CLASSES = ("22", "P0")


def configure_logging(level: str) -> None:
    """Send log lines of at least `level` to stderr. Exceptions are logged without local values: they hold user data."""
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
    """How logs call a user: by the first digits of the SHA-256 of the id, or as it is.

    Whoever knows the id finds its lines; who has only the log must guess ids. No key, so that every service and worker
    says the same, and `printf %s <id> | sha256sum` does, too.
    """
    return user_id if mode == "plain" else f"user:{sha256(user_id.encode()).hexdigest()[:HASH_DIGITS]}"


def described(error: BaseException) -> str:
    """An error in one line that quotes nobody's data: its kind, and its code and message where these are safe."""
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
    """An error of Redis without the command that redis-py quotes, and without the part of a key that names a user."""
    text = re.sub(r"^Command # \d+ \(.*\) of pipeline caused error: ", "", text, flags=re.DOTALL)
    text = text.partition(", with args beginning with")[0]
    return re.sub(r"(\{\w+\}:[a-z-]+):[^\s']+", r"\1:…", " ".join(text.split()))


class _ErrorsDescribed(logging.Filter):
    """Has errors among the arguments of a log line quote nobody's data."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(described(arg) if isinstance(arg, BaseException) else arg for arg in record.args)
        return True


# Under which the client logs; where to, and from which level on, is up to the service.
client_logger = logging.getLogger("meterfall")
client_logger.addFilter(_ErrorsDescribed())
