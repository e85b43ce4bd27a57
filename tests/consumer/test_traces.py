"""The trace of a request: from the producer through the stream to the usage log, `explain` and spans."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from loguru import logger
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis import Redis

from config.settings import Settings
from schemas.traces import MAX_TRACEPARENT_LENGTH, traceparent_of
from tests.support.ledger import rows
from tests.support.resources import settings_for, worker_resources
from tests.support.signatures import KEYS, signature
from tests.support.streams import partition_of
from worker import tracing
from worker.admin import accounts, dead_letters
from worker.admin.erasure import close_account
from worker.client import Billing
from worker.consumer.drain import drain_stream
from worker.keyspace.keys import SPONSORSHIP
from worker.reports.explain import explain
from worker.resources import Resources

USER, METER = "user-42", "premium_voice"
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
_exporter = InMemorySpanExporter()


@pytest.fixture
def billing(settings: Settings) -> Iterator[Billing]:
    with closing(Billing.connect(settings)) as billing:
        yield billing


class Host(trace.TracerProvider):
    """The host's OpenTelemetry. A process can set one provider, for ever: so this one traces while it `is_on`.

    Else the events and the log lines of all later tests of this process would carry traces.
    """

    def __init__(self) -> None:
        self._sdk = TracerProvider()
        self._sdk.add_span_processor(SimpleSpanProcessor(_exporter))
        self.is_on = False

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return (self._sdk if self.is_on else trace.NoOpTracerProvider()).get_tracer(*args, **kwargs)


@pytest.fixture(scope="module")
def host() -> Host:
    host = Host()
    trace.set_tracer_provider(host)
    return host


@pytest.fixture
def spans(host: Host) -> Iterator[InMemorySpanExporter]:
    _exporter.clear()
    host.is_on = True
    yield _exporter
    host.is_on = False


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported OpenTelemetry."""
    monkeypatch.setattr(tracing, "_api", lambda: None)


def drain(resources: Resources) -> None:
    while drain_stream(resources, partition_of(resources.settings, USER)).more:
        pass


def traces_in(settings: Settings) -> dict[object, object]:
    return dict(rows(settings, "SELECT event_id, trace_id FROM usage_log"))  # type: ignore[arg-type]


def entries_in(redis: Redis, settings: Settings) -> list[dict[bytes, bytes]]:
    found = cast("list[tuple[bytes, dict[bytes, bytes]]]", redis.xrange(partition_of(settings, USER).entries))
    return [fields for _, fields in found if b"e" in fields]


@pytest.mark.parametrize(
    ("value", "is_right"),
    [
        (TRACEPARENT, True),
        (TRACEPARENT.replace("00-", "01-", 1) + "-later", True),
        ("", False),
        (TRACEPARENT.upper(), False),
        (TRACEPARENT + "\n", False),
        (TRACEPARENT + "-later", False),
        (TRACEPARENT.replace("00-", "ff-", 1), False),
        (f"00-{'0' * 32}-{SPAN_ID}-01", False),
        (f"00-{TRACE_ID}-{'0' * 16}-01", False),
        (TRACEPARENT.replace("4", "٤", 1), False),
        (TRACEPARENT.replace("00-", "01-", 1) + "-" + "a" * MAX_TRACEPARENT_LENGTH, False),
    ],
)
def test_what_is_a_traceparent(value: str, is_right: bool) -> None:
    assert traceparent_of(value) == traceparent_of(value.encode()) == (value if is_right else None)


@pytest.mark.usefixtures("no_host")
def test_every_call_that_appends_carries_the_trace_it_is_given(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing
) -> None:
    accounts.open_new(resources, USER, "basic")
    billing.emit(USER, METER, 1, event_id="emit", traceparent=TRACEPARENT)
    billing.emit(USER, METER, 1, event_id="without")
    billing.charge(USER, METER, 1, event_id="charge", traceparent=TRACEPARENT)
    hold = billing.reserve(USER, METER, 10, key="hold")
    hold.capture("part", 1, traceparent=TRACEPARENT)
    hold.settle(2, traceparent=TRACEPARENT)
    billing.reserve(USER, METER, 10, key="key")
    billing.capture(USER, METER, "key", "page", 1, traceparent=TRACEPARENT)
    billing.settle(USER, METER, "key", 2, traceparent=TRACEPARENT)
    drain(resources)
    carried = dict.fromkeys(["emit", "charge", "part", "hold", "page", "key"], TRACE_ID)
    assert traces_in(settings) == {**carried, "without": None}
    assert explain(resources, USER, "charge").trace_id == TRACE_ID
    assert explain(resources, USER, "without").trace_id is None


def test_a_signed_event_has_both_stamps_and_only_its_payload_is_signed(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    signing = settings_for(settings.database_url or "", settings.redis_url, signing_keys=KEYS)
    with closing(Billing.connect(signing)) as billing:
        billing.emit(USER, METER, 1, event_id="a", traceparent=TRACEPARENT)
        billing.charge(USER, METER, 1, event_id="b", traceparent=TRACEPARENT)
    for fields in entries_in(redis, settings):
        assert (fields[b"t"], fields[b"s"]) == (TRACEPARENT.encode(), signature(fields[b"e"]))


def test_a_wrong_trace_of_a_plain_producer_refuses_nothing(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    accounts.open_new(resources, USER, "basic")
    wrong = [b"", b"\xff\x00", b"nonsense", b"a" * 900, TRACEPARENT.encode() + b"\x00"]
    for number, value in enumerate([*wrong, TRACEPARENT.encode()]):
        event = {"event_id": f"e{number}", "user_id": USER, "meter": METER, "quantity": 1}
        redis.xadd(partition_of(settings, USER).entries, {"t": value, "v": "1", "e": json.dumps(event)})
    drain(resources)
    assert traces_in(settings) == {**{f"e{number}": None for number in range(len(wrong))}, f"e{len(wrong)}": TRACE_ID}


def test_the_line_about_one_refused_event_names_its_trace(
    settings: Settings, redis: Redis, resources: Resources
) -> None:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), format="{message}")
    event = {"event_id": "e", "user_id": USER, "meter": METER, "quantity": -1}
    redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event), "t": TRACEPARENT})
    try:
        drain(resources)
    finally:
        logger.remove(sink)
    assert [line for line in said if "1 refused" in line and TRACE_ID in line]


@pytest.mark.usefixtures("no_host")
def test_the_pool_s_grants_keep_the_trace_of_their_request(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing
) -> None:
    accounts.open_new(resources, USER, "basic")
    accounts.set_trust(resources, USER, "trusted")
    drain(resources)
    drain_stream(resources, SPONSORSHIP)
    for request in ("traced", "without", "wrong"):
        assert billing.decide(USER, 10, request).expires_at
    billing.settle_sponsored(USER, "traced", 5, traceparent=TRACEPARENT)
    billing.settle_sponsored(USER, "without", 6)
    billing.settle_sponsored(USER, "wrong", 7, traceparent="nonsense")
    billing.credit_pool("paid", 100, traceparent=TRACEPARENT)
    fields = [each for _, each in cast("list[tuple[bytes, dict[bytes, bytes]]]", redis.xrange(SPONSORSHIP.entries))]
    assert [each.get(b"t") for each in fields if b"k" in each] == [
        TRACEPARENT.encode(),
        None,
        None,
        TRACEPARENT.encode(),
    ]
    drain_stream(resources, SPONSORSHIP)
    traces = "SELECT actual, trace_id FROM sponsor_grant ORDER BY actual"
    assert rows(settings, traces) == [(5, TRACE_ID), (6, None), (7, None)]
    assert rows(settings, "SELECT paid FROM sponsor_credit") == [(100,)]
    assert dead_letters.listed(resources) == []
    close_account(resources, USER)
    assert rows(settings, traces) == [(5, None), (6, None), (7, None)]


def test_the_pool_s_spans_and_refusals_name_the_trace(
    settings: Settings, redis: Redis, resources: Resources, spans: InMemorySpanExporter
) -> None:
    redis.xadd(SPONSORSHIP.entries, {"v": "1", "k": "credit", "request": "r", "paid": "5", "t": TRACEPARENT})
    redis.xadd(SPONSORSHIP.entries, {"v": "1", "k": "credit", "request": "r", "paid": "6", "t": TRACEPARENT})
    redis.xadd(SPONSORSHIP.entries, {"v": "1", "k": "nonsense", "t": TRACEPARENT})
    drain_stream(resources, SPONSORSHIP)
    (batch,) = [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.CONSUMER]
    assert [f"{link.context.span_id:016x}" for link in batch.links] == [SPAN_ID]
    letters = [(letter.reason, letter.traceparent) for letter in dead_letters.listed(resources)]
    assert letters == [("id_conflict", TRACEPARENT), ("bad_pool_entry", TRACEPARENT)]


@pytest.mark.usefixtures("no_host")
def test_a_replayed_dead_letter_keeps_its_trace(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    impatient = settings_for(settings.database_url or "", settings.redis_url, event_max_age_days=1)
    with closing(Billing.connect(settings)) as billing:
        old = datetime.now(UTC) - timedelta(days=3)
        billing.emit(USER, METER, 1, event_id="traced", occurred_at=old, traceparent=TRACEPARENT)
        billing.emit(USER, METER, 1, event_id="other", occurred_at=old)
    with worker_resources(impatient) as refusing:
        drain(refusing)
    letters = dead_letters.listed(resources)
    assert [letter.reason for letter in letters] == ["too_old"] * 2
    for letter in letters:
        dead_letters.replay(resources, letter.id)
    drain(resources)
    assert traces_in(settings) == {"traced": TRACE_ID, "other": None}


def test_traces_go_with_a_closed_account(settings: Settings, redis: Redis, resources: Resources) -> None:
    accounts.open_new(resources, USER, "basic")
    for quantity in (1, -1):
        event = {"event_id": f"e{quantity}", "user_id": USER, "meter": METER, "quantity": quantity}
        redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event), "t": TRACEPARENT})
    drain(resources)
    assert rows(settings, "SELECT traceparent FROM dead_letter") == [(TRACEPARENT,)]
    close_account(resources, USER)
    assert traces_in(settings) == {"e1": None}
    assert rows(settings, "SELECT traceparent FROM dead_letter") == [(None,)]


def test_the_host_s_request_is_the_trace_and_spans_tell_of_it(
    settings: Settings, redis: Redis, resources: Resources, billing: Billing, spans: InMemorySpanExporter
) -> None:
    accounts.open_new(resources, USER, "basic")
    with trace.get_tracer("host").start_as_current_span("request") as request:
        billing.emit(USER, METER, 1, event_id="a")
        billing.charge(USER, METER, 1, event_id="b")
        with billing.reserve(USER, METER, 1, key="c") as hold:
            hold.settle(1)
    trace_id = f"{request.get_span_context().trace_id:032x}"
    sent = [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.PRODUCER]
    assert [span.name for span in sent] == ["send meterfall.events"] * 3
    assert {_parent_of(span) for span in sent} == {request.get_span_context().span_id}
    # The entry names the span that sent it, not the request around it.
    carried = {fields[b"t"].decode()[36:52] for fields in entries_in(redis, settings)}
    assert carried == {_span_id_of(span) for span in sent}
    drain(resources)
    assert traces_in(settings) == dict.fromkeys("abc", trace_id)
    (batch,) = [span for span in spans.get_finished_spans() if span.kind is trace.SpanKind.CONSUMER]
    assert batch.name == "process meterfall.events"
    assert {f"{link.context.span_id:016x}" for link in batch.links} == carried
    assert (batch.attributes or {})["messaging.batch.message_count"] == 4  # one asks to publish the account


def test_a_span_tells_the_kind_of_an_error_and_nothing_of_its_data(
    settings: Settings, redis: Redis, billing: Billing, spans: InMemorySpanExporter
) -> None:
    billing.check(USER, METER, 1)
    redis.set(partition_of(settings, USER).entries, "no stream")
    with pytest.raises(Exception, match="WRONGTYPE"):
        billing.emit(USER, METER, 1, event_id="canary")
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "error.type" in (span.attributes or {})
    assert "canary" not in span.to_json()
    assert USER not in span.to_json()


def test_a_batch_links_a_bounded_number_of_traces(
    settings: Settings, redis: Redis, resources: Resources, spans: InMemorySpanExporter
) -> None:
    accounts.open_new(resources, USER, "basic")
    for number in range(tracing.MAX_LINKS + 20):
        event = {"event_id": f"e{number}", "user_id": USER, "meter": METER, "quantity": 1}
        trace_of = f"00-{TRACE_ID}-{number + 1:016x}-01"
        redis.xadd(partition_of(settings, USER).entries, {"v": "1", "e": json.dumps(event), "t": trace_of})
    drain(resources)
    (batch,) = spans.get_finished_spans()
    assert len(batch.links) == tracing.MAX_LINKS


def test_without_the_package_nothing_is_done() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None; from worker import tracing\n"
        "with tracing.sending(1) as traceparent: print(traceparent)\n"
        "tracing.Processing('0').end([])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "None"


def test_where_nobody_takes_spans_the_context_of_the_caller_travels_on() -> None:
    program = (
        "from opentelemetry import trace; from worker import tracing\n"
        "with tracing.sending(1) as traceparent: print(traceparent)\n"
        f"context = trace.SpanContext(0x{TRACE_ID}, 0x{SPAN_ID}, True, trace.TraceFlags(1))\n"
        "with trace.use_span(trace.NonRecordingSpan(context)), tracing.sending(1) as traceparent: print(traceparent)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["None", TRACEPARENT]


def _parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def _span_id_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.span_id:016x}"
