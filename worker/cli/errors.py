"""The end of a command: every expected error becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

import typer

from worker.cli.io import BAD_INPUT, DONE, REFUSED
from worker.errors import BadInput, BillingError, KeyConflict

# Errors of a write to the standard output.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run(app: typer.Typer) -> NoReturn:
    """Run the command that the arguments of this process name, and exit with its code."""
    try:
        code = app(prog_name="meterfall", standalone_mode=False)
        sys.stdout.flush()  # a full disk is an error of the command, not of the interpreter's end
    except typer.TyperException as error:
        if not error.format_message():  # without arguments the help was printed
            sys.exit(BAD_INPUT)
        fail(error.format_message(), BAD_INPUT)
    except KeyConflict as error:
        fail(str(error), REFUSED)
    except BadInput as error:
        fail(str(error), BAD_INPUT)
    except BillingError as error:
        fail(str(error), REFUSED)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever is not expected is raised again
        fail(*_ending(error))
    sys.exit(code or DONE)


def fail(message: str, code: int) -> NoReturn:
    """Print the message as one line on stderr, and exit with `code`."""
    typer.echo(f"meterfall: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _ending(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code for an error of settings, catalogue or server.

    Raises any other error again. Imports the libraries behind these errors only now, as most commands succeed.
    """
    from config.catalogue import CatalogueError
    from config.settings import SettingsError

    if isinstance(error, SettingsError | CatalogueError):
        return str(error), BAD_INPUT
    if isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename is None:
        # What is left goes nowhere: the interpreter would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"output: {error.strerror}", REFUSED

    import psycopg
    import redis
    from sqlalchemy.exc import SQLAlchemyError

    from worker.demo.servers import ServerStartError
    from worker.demo.stage import RehearsalError

    if isinstance(error, RehearsalError | ServerStartError):
        return str(error), REFUSED
    if (fault := _fault(error)) is not None:
        return fault, BAD_INPUT
    if isinstance(error, redis.RedisError):
        return f"REDIS_URL: {_address('redis_url')} does not answer: {error}", REFUSED
    if isinstance(error, psycopg.OperationalError | SQLAlchemyError):
        reason = str(error).strip().splitlines()[0]
        return f"DATABASE_URL: {_address('database_url')} does not answer: {reason}", REFUSED
    raise error


def _fault(error: Exception) -> str | None:
    """Return the fault of the configuration that a server named, with the role that this command needs."""
    from config.settings import load_settings
    from worker.cli.roles import role_of
    from worker.keyspace import faults as redis_faults
    from worker.ledger import faults as ledger_faults

    settings = load_settings(os.environ)
    command, role = role_of(sys.argv[1:])
    if command == "migrate" and settings.migrate_url is not None:
        found = ledger_faults.fault_of(error, settings.model_copy(update={"database_url": settings.migrate_url}))
        return found and found.replace("DATABASE_URL", "METERFALL_MIGRATE_URL", 1)
    return redis_faults.fault_of(error, settings, command=command, role=role) or ledger_faults.fault_of(
        error, settings, command=command, role=role and f"meterfall_{role}"
    )


def _address(field: str) -> str:
    """Return the address of the server in a setting, without its password."""
    from config.settings import load_settings, without_secrets

    url = getattr(load_settings(os.environ), field)
    return without_secrets(url) if url else "unset"
