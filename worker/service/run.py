"""`meterfall serve`: uvicorn with the application, in one process or several."""

from __future__ import annotations

import signal

import uvicorn
from loguru import logger

from config.catalogue import catalogue_of
from config.settings import Settings
from worker.errors import BadInput
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
