"""Logging: one loguru sink on stderr, one line a message."""

from __future__ import annotations

import sys

from loguru import logger


def configure_logging(level: str) -> None:
    """Send log lines of at least `level` to stderr. Exceptions are logged without local values: they hold user data."""
    logger.remove()
    logger.add(
        sys.stderr,
        level=level,
        format="{time:YYYY-MM-DDTHH:mm:ss.SSSZ} {level:<7} {message}",
        backtrace=False,
        diagnose=False,
    )
