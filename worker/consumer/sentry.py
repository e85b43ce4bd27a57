"""Errors that nobody expects go to Sentry, if `SENTRY_DSN` is set and the extra `sentry` is installed; dynos only.

A report says as little as a line of the log: kind, code and places of the error. Everything else that the SDK would
collect stays here: values of variables, messages, arguments, breadcrumbs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loguru import logger

from config.log import described, is_expected
from worker.version import read_version

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

# What an event keeps beside its exceptions.
_KEPT = ("event_id", "timestamp", "platform", "level", "release", "environment", "server_name", "sdk")
_KEPT_OF_FRAMES = ("filename", "module", "function", "lineno", "in_app")


def set_up(environ: Mapping[str, str]) -> None:
    """Send what `report` gets, and what ends this process, to the Sentry of `SENTRY_DSN`; without it do nothing.

    A DSN or a package that is wrong is a warning: no dyno fails for it.
    """
    dsn = environ.get("SENTRY_DSN")
    if not dsn:
        return
    try:
        import sentry_sdk
        from sentry_sdk.integrations.atexit import AtexitIntegration
        from sentry_sdk.integrations.excepthook import ExcepthookIntegration
    except ImportError:
        logger.warning("SENTRY_DSN is set, and the package is missing: pip install 'meterfall[sentry]'")
        return
    try:
        sentry_sdk.init(
            dsn,
            release=f"meterfall@{read_version()}",
            before_send=_without_data,
            default_integrations=False,
            auto_enabling_integrations=False,
            integrations=[ExcepthookIntegration(), AtexitIntegration(callback=lambda *_: None)],
            include_local_variables=False,
            include_source_context=False,
            max_breadcrumbs=0,
            send_default_pii=False,
            send_client_reports=False,
            auto_session_tracking=False,
        )
    except ValueError as error:  # what it says of a DSN may quote its key
        logger.warning("SENTRY_DSN: no DSN ({}); errors stay in the log", described(error))


def report(error: BaseException) -> None:
    """Report an error, unless it is one of a server or a network. Never raises; does nothing unless it is set up."""
    sdk = sys.modules.get("sentry_sdk")
    if sdk is not None and not is_expected(error):
        sdk.capture_exception(error)


def _without_data(event: Event, hint: Hint) -> Event | None:
    """Return the event with nothing but what a log line may say of its error; None for one without an error."""
    if "exc_info" not in hint:
        return None
    told: dict[str, Any] = {name: value for name, value in event.items() if name in _KEPT}
    values = [_place_of(value) for value in event.get("exception", {}).get("values", [])]
    if values:  # the last one is the error itself, those before are its causes
        values[-1]["value"] = described(hint["exc_info"][1])
    return {**told, "exception": {"values": values}}  # type: ignore[return-value]


def _place_of(exception: Mapping[str, Any]) -> dict[str, Any]:
    frames = (exception.get("stacktrace") or {}).get("frames", [])
    kept = [{name: frame[name] for name in _KEPT_OF_FRAMES if name in frame} for frame in frames]
    return {"type": exception.get("type"), "module": exception.get("module"), "stacktrace": {"frames": kept}}
