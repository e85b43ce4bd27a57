"""`meterfall serve`: uvicorn with the application, in one process or several."""

from __future__ import annotations

import os
import signal
from secrets import token_hex

import uvicorn
from loguru import logger

from config.catalogue import catalogue_of
from config.settings import Settings, variable_name
from worker.errors import BadInput
from worker.rules.sessions import SECRET_BYTES
from worker.service.app import application

# Each process imports it by this name.
_APPLICATION = f"{application.__module__}:{application.__qualname__}"


def serve(settings: Settings) -> None:
    """Listen until SIGTERM or ^C. Then requests under way have a while to end, and later ones are cut off.

    Several processes share the port; one that dies is started again.
    Raises BadInput if DATABASE_URL is unset, and CatalogueError.
    """
    if settings.database_url is None:
        raise BadInput("DATABASE_URL: unset; the service reads API keys and accounts there")
    catalogue_of(settings)
    if settings.console_secret is None:  # all processes of this start share it
        os.environ[variable_name("console_secret")] = token_hex(SECRET_BYTES)
    logger.info("serving on {}:{}, {} processes", settings.serve_host, settings.serve_port, settings.serve_processes)
    # uvicorn raises the signal that ended it once more: a stop that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(
        _APPLICATION,
        factory=True,
        host=settings.serve_host,
        port=settings.serve_port,
        workers=settings.serve_processes,
        timeout_graceful_shutdown=settings.serve_stop_timeout_seconds,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
    )
