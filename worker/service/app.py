"""The application: operations behind the guard, probes and the console beside them, and the door around all."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing import parent_process
from typing import Any

from fastapi import FastAPI
from starlette.responses import RedirectResponse

from config.log import configure_logging
from config.settings import Settings, load_settings
from worker.process import end_with_parent
from worker.service import probing
from worker.service.access import OPERATIONS, GuardedRoute, Operation
from worker.service.console.app import CONSOLE, console_running, make_console, shown
from worker.service.door import Door
from worker.service.problems import MEDIA_TYPE, add_error_handlers
from worker.service.service import running
from worker.version import read_version

_PROBLEMS = {
    401: "no API key, or one that is not in force",
    403: "the role of the key does not have this right",
    408: "the body did not arrive in time",
    413: "the body is too large, or has too many events",
    415: "another media type",
    422: "a field is wrong",
    429: "the service has too much work",
    500: "the service failed",
    503: "a server does not answer",
}
_UNKNOWN = {404: "no such account, or no such event of it; `reason` says which"}
_CONFLICTS = {402: "denied, with the figures of the check", 409: "the key was used for something else, or is over"}


def make_app(settings: Settings) -> FastAPI:
    """Return the application; it opens its connections when it starts to run."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with running(settings) as service, console_running(settings) as console:
            yield {"service": service, "console": console}

    app = FastAPI(
        title="meterfall",
        version=read_version(),
        description="Pre-flight checks, usage events and accounts over HTTP.",
        lifespan=lifespan,
        # Documents for people have scripts in them; the repository has the file.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # It would put the texts of errors, which quote payloads, into the host's log.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        redirect_slashes=False,
    )
    add_error_handlers(app)
    app.router.route_class = GuardedRoute
    for each in OPERATIONS:
        app.add_api_route(
            each.path,
            each.call,
            methods=[each.method],
            response_model=each.answer,
            status_code=each.status,
            responses=_problems(each),
            operation_id=each.call.__name__,
        )
    app.include_router(probing.router)
    app.mount(CONSOLE, make_console())
    app.add_route(CONSOLE, lambda _request: RedirectResponse(f"{CONSOLE}/", 308))
    return app


def _problems(operation: Operation) -> dict[int | str, dict[str, Any]]:
    texts = _PROBLEMS | (_CONFLICTS if operation.method == "POST" else {})
    if operation.finds_account:
        texts |= _UNKNOWN
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": text, "content": content} for status, text in sorted(texts.items())}


def application() -> Door:
    """Return the application as uvicorn runs it, by the environment. Each process calls this once.

    Raises SettingsError or CatalogueError.
    """
    if (parent := parent_process()) is not None and parent.pid is not None:
        end_with_parent(signal.SIGTERM, parent.pid)  # several processes: without it they would keep the port for ever
    settings = load_settings(os.environ)
    configure_logging(settings.log_level, settings.log_format)
    return Door(make_app(settings), settings, shown)
