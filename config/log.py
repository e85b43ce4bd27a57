"""Logging: one loguru sink on stderr, one line per message, without personal data.

More people read logs than the ledger. So logs name a user by a hash, and an error by its kind and code: messages of
Postgres and redis-py quote rows, arguments and keys. Ids of events, holds and stream entries appear in full.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from math import inf
from pathlib import Path
from time import monotonic
from traceback import extract_tb
from typing import Any, Literal, NamedTuple

from redis.exceptions import RedisError

from schemas.codes import API_KEY_PATTERN

HASH_DIGITS = 12
# SQLSTATEs with messages that quote values: data exceptions, and errors raised by triggers.
_QUOTING_CLASSES = ("22", "P0")
# SQLSTATEs of a server that is away, full, or not as it should be; their errors need no traceback.
_EXPECTED_CLASSES = ("08", "25", "28", "3D", "40", "42", "53", "55", "57", "58")
SECONDS_BETWEEN_REPEATS = 60.0
_FRAMES_SHOWN = 8
_API_KEY = re.compile(API_KEY_PATTERN, re.ASCII)


def configure_logging(level: str, form: Literal["text", "json"] = "text") -> None:
    """Log from `level` upwards to stderr, one line per message; also what RQ, redis-py and the client log.

    Warnings and errors of one cause appear once a minute, with their number. The cause is `extra["cause"]` of a
    message, else its text. An error is described without user data, whoever logs it; one that nobody expects has the
    places where it happened.
    """
    from loguru import logger  # services log with the standard library alone

    write = _write_json if form == "json" else _write_text
    logger.remove()
    logger.add(_OncePerMinute(write), level=level, format="{message}", backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    client_logger.setLevel(logging.DEBUG if level == "TRACE" else level)
    # It warns of errors that it ignores because it raises another one.
    logging.getLogger("psycopg").setLevel(logging.ERROR)


def _write_text(line: _Line) -> None:
    _put(f"{line.at:%Y-%m-%dT%H:%M:%S}.{line.at.microsecond // 1_000:03}Z {line.level:<7} {line.text}")


def _write_json(line: _Line) -> None:
    about = {"time": line.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": line.level}
    _put(json.dumps({**about, "message": line.text, "pid": os.getpid(), **line.facts}, default=str))


def _put(line: str) -> None:
    sys.stderr.write(without_api_keys(line) + "\n")


class _Line(NamedTuple):
    """A line of the log. `facts` are its fields beside the message."""

    at: datetime
    level: str
    text: str
    facts: dict[str, Any]


class _OncePerMinute:
    """A sink of loguru that writes warnings and errors of one cause once a minute, with the number of those between.

    The next line of any cause brings the numbers of causes whose minute is over, with the time of the last one. A
    message with `extra["recovers"]` says that a server answers again: before it come the numbers of all causes, as
    INFO, since nothing of them goes on. The next error of such a cause is a line of its own at once.
    """

    def __init__(self, write: Callable[[_Line], None], clock: Callable[[], float] = monotonic) -> None:
        self._write = write
        self._clock = clock
        self._silenced: dict[str, _Silenced] = {}

    def write(self, message: Any) -> None:
        """Write a message of loguru, or count it."""
        record = message.record
        facts = dict(record["extra"])
        cause = facts.pop("cause", None) or record["message"]
        recovers = facts.pop("recovers", False)
        line = _Line(record["time"].astimezone(UTC), record["level"].name, record["message"], facts)
        now = self._clock()
        self._write_what_is_over(line.at, inf if recovers else now, "INFO" if recovers else None)
        if record["level"].no >= logging.WARNING:
            silenced = self._silenced.get(cause)
            if silenced is not None:
                silenced.times += 1
                silenced.line = line
                return
            self._silenced[cause] = _Silenced(now + SECONDS_BETWEEN_REPEATS, line)
        self._write(line)

    def stop(self) -> None:
        """Write the numbers of all causes; loguru calls it when it removes the sink."""
        self._write_what_is_over(datetime.now(UTC), inf)

    def _write_what_is_over(self, at: datetime, now: float, level: str | None = None) -> None:
        """Write the numbers of causes whose minute is over at `now`, at `level`, by default that of their lines."""
        over = [cause for cause, silenced in self._silenced.items() if silenced.until <= now]
        for cause in over:
            silenced = self._silenced.pop(cause)
            if not silenced.times:
                continue
            line = silenced.line
            again = f"{line.text} ({silenced.times} more like it until {line.at:%H:%M:%S})"
            self._write(line._replace(at=at, level=level or line.level, text=again))
            if now != inf:  # it goes on: the next minute begins
                self._silenced[cause] = _Silenced(now + SECONDS_BETWEEN_REPEATS, silenced.line)


class _Silenced:
    """A cause whose line was written; `times` lines came since, `line` is the last one."""

    def __init__(self, until: float, line: _Line) -> None:
        self.until = until
        self.line = line
        self.times = 0


class _ToLoguru(logging.Handler):
    """Hands the records of the standard library to loguru: of RQ, redis-py, and the client in a dyno.

    Their cause is the message before its arguments, so that ids in it do not make a line a new one.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from loguru import logger

        if record.levelno < logging.WARNING and record.name != client_logger.name:
            return  # what libraries do is their business
        _ErrorsDescribed().filter(record)
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text = f"{text.splitlines()[0] if text else 'error'}: {described(error)}{places_of(error)}"
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.bind(cause=f"{record.name}: {record.msg if isinstance(record.msg, str) else text}").log(
            level, "{}", text
        )


def is_expected(error: BaseException) -> bool:
    """True for an error of a server or a network, of which the description says all; others are faults of ours."""
    error = getattr(error, "orig", None) or error
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate:
        return str(sqlstate).startswith(_EXPECTED_CLASSES)
    known = getattr(error, "is_expected", None)
    return bool(known) or isinstance(error, RedisError | OSError) or type(error).__name__ == "OperationalError"


def places_of(error: BaseException) -> str:
    """Return where an unexpected error happened, innermost place first, without values; nothing for an expected one."""
    if is_expected(error):
        return ""
    frames = reversed(extract_tb(error.__traceback__)[-_FRAMES_SHOWN:])
    return " at " + " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


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
        return f"{name}: {without_arguments(str(error))}"
    if name == "OperationalError":  # libpq could not connect, or lost the connection
        return f"{name}: {' '.join(str(error).split())}"
    if isinstance(error, OSError):
        return f"{name}: {error.strerror}"
    if error.__cause__ is not None:
        return f"{name}: {described(error.__cause__)}"
    frames = extract_tb(error.__traceback__)
    return f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else name


def without_api_keys(text: str) -> str:
    """Strip secrets of API keys of all but the ids of the keys."""
    return _API_KEY.sub(r"mf_\1_…", text)


def without_arguments(text: str) -> str:
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
