"""Spans of OpenTelemetry, where the host has set it up; nowhere else does meterfall know of it.

Names and attributes follow the semantic conventions for messaging. meterfall never imports the package first: where
nobody else has, there is no context to carry and nobody to take a span, so nothing is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from schemas.traces import span_id_of, trace_id_of, traceparent_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

# All partitions are one destination: a name for each would be a name for each setting.
_DESTINATION = "meterfall.events"
# The usual bound of an SDK for the links of one span.
MAX_LINKS = 128


def _api() -> Any:
    """Return the module of OpenTelemetry, None if nobody has imported it."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    return trace


@contextmanager
def sending(events: int) -> Iterator[str | None]:
    """Span the append of `events` events. Yields the `traceparent` that they carry, None without a trace.

    The span is a child of the caller's and never the current one: the block may be left and entered again between
    two steps of a call.
    """
    api = _api()
    if api is None:
        yield None
        return
    if isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        # Somebody has imported it, as redis-py does where it is installed, but nobody takes spans.
        yield _traceparent_in(api.get_current_span().get_span_context())
        return
    span = api.get_tracer("meterfall").start_span(
        f"send {_DESTINATION}", kind=api.SpanKind.PRODUCER, attributes=_attributes("send", events)
    )
    try:
        yield _traceparent_in(span.get_span_context())
    except Exception as error:
        _note_error(span, error)
        raise
    finally:
        span.end()


class Processing:
    """The span of one batch, from its begin to its COMMIT. Without a host's OpenTelemetry it does nothing."""

    def __init__(self, partition: str) -> None:
        api = _api()
        self._span: Span | None = api and api.get_tracer("meterfall").start_span(
            f"process {_DESTINATION}", kind=api.SpanKind.CONSUMER, attributes=_attributes("process")
        )
        if self._span is not None:
            self._span.set_attribute("messaging.destination.partition.id", partition)

    def end(self, items: Iterable[Any], error: Exception | None = None) -> None:
        """Link the traces of the items, at most 128, and end. A span that never ends is not exported."""
        if self._span is None or not self._span.is_recording():
            return
        items = list(items)
        self._span.set_attribute("messaging.batch.message_count", len(items))
        traces = dict.fromkeys(trace for item in items if (trace := getattr(item, "traceparent", None)))
        for traceparent in list(traces)[:MAX_LINKS]:
            self._span.add_link(_context_of(traceparent))
        if error is not None:
            _note_error(self._span, error)
        self._span.end()


def _attributes(operation: str, events: int = 0) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": "redis",
        "messaging.destination.name": _DESTINATION,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    return {**attributes, "messaging.batch.message_count": events} if events > 1 else attributes


def _traceparent_in(context: SpanContext) -> str | None:
    if not context.is_valid:
        return None
    return traceparent_of(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}")


def _context_of(traceparent: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    flags = TraceFlags(int(traceparent[53:55], 16) & TraceFlags.SAMPLED)
    return SpanContext(int(trace_id_of(traceparent) or "", 16), int(span_id_of(traceparent), 16), True, flags)


def _note_error(span: Span, error: Exception) -> None:
    """Say what kind of error it was: its text may quote data."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", type(error).__name__)
    span.set_status(StatusCode.ERROR)
