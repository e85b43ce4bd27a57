"""How a command ends: every expected error becomes one line on stderr, and an exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from config.catalogue import CatalogueError
from config.settings import SettingsError, load_settings, without_secrets
from worker.cli.io import BAD_INPUT, DONE, REFUSED
from worker.errors import BadInput


def run(app: typer.Typer) -> NoReturn:
    """Entry point of `meterfall`: run a command, turn every expected error into one line and its exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if not error.format_message():  # without arguments the help was printed
            sys.exit(BAD_INPUT)
        fail(error.format_message(), BAD_INPUT)
    except (SettingsError, CatalogueError, BadInput) as error:
        fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever is not expected is raised again
        fail(_refusal(error), REFUSED)
    sys.exit(code or DONE)


def _refusal(error: Exception) -> str:
    """The sentence for an error that is nobody's mistake here. Raises it again where it is a fault of the program."""
    import psycopg
    import redis
    from sqlalchemy.exc import SQLAlchemyError

    from worker.demo.servers import ServerStartError
    from worker.demo.stage import RehearsalError
    from worker.errors import BillingError

    if isinstance(error, BillingError | RehearsalError | ServerStartError):
        return str(error)
    if isinstance(error, redis.RedisError):
        return f"REDIS_URL: {_address('redis_url')} does not answer: {error}"
    if isinstance(error, psycopg.OperationalError | SQLAlchemyError):
        reason = str(error).strip().splitlines()[0]
        return f"DATABASE_URL: {_address('database_url')} does not answer: {reason}"
    raise error


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"meterfall: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _address(field: str) -> str:
    """The server that was tried, without its password."""
    url = getattr(load_settings(os.environ), field)
    return without_secrets(url) if url else "unset"
