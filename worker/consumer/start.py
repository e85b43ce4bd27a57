"""The line that a dyno logs at its start."""

from __future__ import annotations

import os
import socket

from loguru import logger

from config.settings import without_secrets
from worker.keyspace.server import read_server
from worker.resources import Resources
from worker.rules.catalogues import ADD_DEFAULT_PLAN, missing_default_plan
from worker.version import read_version


def log_start(resources: Resources) -> None:
    """Log one line about this dyno, without secrets, and one about each thing that is wrong already.

    The line names release, host, process, partitions, servers, and the digest of the catalogue.
    """
    settings = resources.settings
    servers = [without_secrets(url) for url in (settings.redis_url, settings.database_url) if url]
    logger.info(
        "meterfall {} starts on {} with pid {}: {} partitions, {}, catalogue {}",
        read_version(),
        socket.gethostname(),
        os.getpid(),
        settings.partitions,
        " and ".join(servers),
        resources.catalogue.digest,
    )
    if (plan := resources.missing_default_plan) is not None:
        logger.error("{}: {}", missing_default_plan(plan), ADD_DEFAULT_PLAN)
    for danger in read_server(resources.redis).dangers():
        logger.warning("Redis at {}: {}", servers[0], danger)
