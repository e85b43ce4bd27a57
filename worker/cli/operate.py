"""The commands, `meterfall …`. Each parses, calls one function, and prints a table or JSON.

Those about plans and accounts are in `accounts`, those that report in `reports`; what all commands take in and
give out is in `io`.

Exit codes: 0 done, 1 refused or found wrong, 2 bad usage or bad input, always with one line that says what to change.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from config.catalogue import CatalogueError
from config.settings import SettingsError, load_settings, without_secrets
from schemas.events import Refusal
from worker.cli.accounts import account_app, catalogue_app, plans, reverse
from worker.cli.io import (
    BAD_INPUT,
    DONE,
    MAX_LISTED,
    REFUSED,
    AmountArgument,
    BackendOption,
    DimensionOption,
    EventOption,
    HoldKeyArgument,
    JsonOption,
    MeterArgument,
    SourceOption,
    User,
    counted,
    open_billing,
    open_resources,
    parse_dimensions,
    print_fields,
    print_json,
    print_rows,
    read_lines,
    read_settings,
    show_progress,
)
from worker.cli.reports import explain, usage
from worker.cli.sponsorship import estimate, pool_app
from worker.errors import BadInput
from worker.rules.explanations import explain_check

if TYPE_CHECKING:
    from worker.client import Billing
    from worker.demo.stage import Report, Sponsored
    from worker.keyspace.keys import Stream
    from worker.ledger.reports import ClosedPeriod
    from worker.resources import Resources

RelayMeterOption = Annotated[str, typer.Option("--meter", help="meter, as in the catalogue")]
PartitionArgument = Annotated[str, typer.Argument(help="number of the partition, or sponsor for the pool's stream")]
LettersArgument = Annotated[list[int] | None, typer.Argument(help="ids", show_default=False)]
AllOfReasonOption = Annotated[Refusal | None, typer.Option("--reason", help="all open ones of this reason")]
ReasonOption = Annotated[str, typer.Option(help="why, for whoever comes after you")]
ByOption = Annotated[str, typer.Option(envvar=["USER", "LOGNAME"], help="who")]
TierOption = Annotated[str | None, typer.Option(help="plan that the request carries; the account is put on it first")]

NO_SPOOL = "METERFALL_SPOOL_PATH: unset; it names the folder of the spool"
# Items in one go, and how long to wait while another process sends.
SPOOLED_A_CALL, TURN_SECONDS = 1_000, 10.0

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Usage events in, balances out.")
worker_app = typer.Typer(no_args_is_help=True, help="Run workers.")
holds_app = typer.Typer(no_args_is_help=True, help="Look at holds and release them.")
dead_app = typer.Typer(no_args_is_help=True, help="Entries that were refused.")
partition_app = typer.Typer(no_args_is_help=True, help="Streams that are left alone until somebody has looked.")
spool_app = typer.Typer(no_args_is_help=True, help="What Redis has not confirmed, on this machine's disk.")
cache_app = typer.Typer(no_args_is_help=True, help="What Redis keeps of the ledger.")
app.add_typer(worker_app, name="worker")
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(account_app, name="account")
app.add_typer(holds_app, name="holds")
app.add_typer(dead_app, name="dead")
app.add_typer(pool_app, name="pool")
app.add_typer(partition_app, name="partition")
app.add_typer(spool_app, name="spool")
app.add_typer(cache_app, name="cache")


# ---------------------------------------------------------------------------------------------------------------------
# Set-up and workers


@app.command()
def migrate(
    revision: Annotated[str, typer.Argument(help="head, base, or a number: forward or back")] = "head",
) -> None:
    """Bring the ledger's tables to a revision, while workers go on."""
    from worker.ledger import migrate as ledger_migrate

    settings = read_settings()
    if settings.database_url is None:
        raise BadInput("DATABASE_URL: unset; it names the Postgres to migrate")
    ledger_migrate.migrate(settings.database_url, revision, settings.migrate_patience_seconds)
    typer.echo(f"ledger is at {revision}")


@worker_app.command("run")
def worker_run(burst: Annotated[bool, typer.Option(help="end when every stream is empty")] = False) -> None:
    """Run one dyno: a worker process and its supervisor. Waits for servers that do not answer yet."""
    from worker.consumer.supervisor import Supervisor

    raise typer.Exit(Supervisor(read_settings(), dict(os.environ)).run(burst=burst))


# ---------------------------------------------------------------------------------------------------------------------
# Rehearsals


@app.command()
def demo(
    events: Annotated[int, typer.Option(min=1, help="pieces of work")] = 20_000,
    users: Annotated[int, typer.Option(min=1, max=100_000, help="accounts, spread over all plans")] = 1_000,
    seed: Annotated[int, typer.Option(help="the same seed makes the same load")] = 1,
    as_json: JsonOption = False,
) -> None:
    """See it work: accounts, producers, workers, and the proof that nothing was lost or billed twice."""
    from worker.demo.services import run_demo

    report = run_demo(os.environ, size=events, users=users, seed=seed)
    _print_report(report, as_json)
    raise typer.Exit(REFUSED if report.faults else DONE)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="CSV: TIMESTAMP,ContextTokens,GeneratedTokens")],
    speed: Annotated[float | None, typer.Option(min=0.001, help="times the recorded pace; default flat out")] = None,
    users: Annotated[int, typer.Option(min=1, max=100_000, help="accounts that share the rows")] = 1_000,
    seed: Annotated[int, typer.Option(help="draws the user of each row")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first rows")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=64, help="started for it; default 0, on servers of our own 2")
    ] = None,
    run: Annotated[str | None, typer.Option(help="name; the same again bills nothing twice; default a new one")] = None,
    as_json: JsonOption = False,
) -> None:
    """Feed a recorded trace, wait until it is drained, and prove that every row was billed once."""
    from worker.demo.replay import new_run, read_trace, run_replay

    rows = read_trace(trace, limit)
    name = new_run(run)
    report = run_replay(os.environ, rows, run=name, users=users, seed=seed, speed=speed, workers=workers)
    _print_report(report, as_json)
    raise typer.Exit(REFUSED if report.faults else DONE)


# ---------------------------------------------------------------------------------------------------------------------
# Events and pre-flight


@app.command()
def emit(
    file: Annotated[str, typer.Argument(help="JSON lines, one event each; - for standard input")],
    raw: Annotated[bool, typer.Option(help="plain XADD, as a producer in another language would do it")] = False,
) -> None:
    """Append events. Nothing is sent unless every line is valid; --raw sends whatever the lines say.

    Both sign, if there is a key.
    """
    lines = read_lines(file)
    spooled = 0
    with open_billing() as billing:
        if raw:
            sent = _emit_raw(billing, lines)
        else:
            answers = billing.emit_events(_parsed_events(billing, lines))
            spooled = sum(answer.spooled for answer in answers)
            sent = len(answers) - spooled
    typer.echo(f"{counted(sent, 'event')} sent" + (f", {spooled} spooled" if spooled else ""))


@app.command()
def check(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument = 1,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """May this user spend so many units now? Exit code 1 if not."""
    with open_billing() as billing:
        answer = billing.check(user, meter, amount, backend=backend)
    print_fields(answer.model_copy(update={"explanation": explain_check(answer)}).model_dump(mode="json"), as_json)
    raise typer.Exit(DONE if answer.allowed else REFUSED)


@app.command()
def reserve(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    key: HoldKeyArgument,
    ttl_seconds: Annotated[int | None, typer.Option(help="life of the hold")] = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check, and set the amount aside."""
    with open_billing() as billing:
        hold = billing.reserve(user, meter, amount, key, ttl_seconds, backend=backend)
    print_fields(hold.answer.model_dump(mode="json"), as_json)


@app.command()
def capture(
    user: User,
    meter: MeterArgument,
    key: HoldKeyArgument,
    event_id: Annotated[str, typer.Argument(help="id of the event")],
    amount: AmountArgument,
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a part of a hold into an event."""
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.capture(user, meter, key, event_id, amount, source=source, dimensions=facts, backend=backend)
    print_fields(answer.model_dump(mode="json"), as_json)


@app.command()
def settle(
    user: User,
    meter: MeterArgument,
    key: HoldKeyArgument,
    actual: AmountArgument,
    event_id: EventOption = None,
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a hold into one event over what was really used."""
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.settle(
            user, meter, key, actual, event_id=event_id, source=source, dimensions=facts, backend=backend
        )
    print_fields(answer.model_dump(mode="json"), as_json)


@app.command()
def release(user: User, meter: MeterArgument, key: HoldKeyArgument, as_json: JsonOption = False) -> None:
    """Give a hold back."""
    with open_billing() as billing:
        print_fields(billing.release(user, meter, key).model_dump(mode="json"), as_json)


@app.command()
def charge(
    user: User,
    meter: MeterArgument,
    amount: AmountArgument,
    event_id: Annotated[str, typer.Argument(help="id of the event; a repeat is harmless")],
    source: SourceOption = None,
    dimension: DimensionOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check and record in one step."""
    with open_billing() as billing:
        facts = parse_dimensions(dimension)
        answer = billing.charge(user, meter, amount, event_id, source=source, dimensions=facts, backend=backend)
    print_fields(answer.model_dump(mode="json"), as_json)


# Registered here, as are others below, because the help lists the commands in the order of their registration.
app.command()(estimate)


@app.command()
def remaining(
    user: User, meter: RelayMeterOption = "relay_credits", tier: TierOption = None, as_json: JsonOption = False
) -> None:
    """What is left of a meter, as a whole and per backend with a sub-cap."""
    with open_billing() as billing:
        answer = billing.remaining(user, meter, tier=tier)
    fields = answer.model_dump(mode="json")
    if not as_json:
        fields["backends"] = {each.backend: f"{each.remaining} of {each.cap}" for each in answer.backends}
    print_fields(fields, as_json)


@app.command("plan-backend")
def plan_backend(
    user: User,
    preference: Annotated[str, typer.Argument(help="gemini_first, hardware_first, gemini_only or hardware_only")],
    hardware: Annotated[bool, typer.Option("--hardware", help="there is hardware of one's own")] = False,
    meter: RelayMeterOption = "relay_credits",
    tier: TierOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which backend should do a request of this user? Exit code 1 if none."""
    with open_billing() as billing:
        answer = billing.plan_backend(user, preference, has_hardware=hardware, meter=meter, tier=tier)
    print_fields(answer.model_dump(mode="json"), as_json)
    raise typer.Exit(DONE if answer.allowed else REFUSED)


@holds_app.command("list")
def holds_list(
    user: Annotated[str | None, typer.Option(help="of this user only")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Open holds."""
    from worker.reports.holds import open_holds

    with open_resources() as resources:
        print_rows([hold._asdict() for hold in open_holds(resources, user, limit)], as_json)


@holds_app.command("show")
def holds_show(user: User, key: HoldKeyArgument, as_json: JsonOption = False) -> None:
    """What Redis remembers of one hold."""
    from worker.reports.holds import find_hold

    with open_resources() as resources:
        record = find_hold(resources, user, key)
    if not record:
        raise BadInput(f"key: no hold {key} of {user} is remembered")
    print_fields(record, as_json)


@holds_app.command("release")
def holds_release(user: User, meter: MeterArgument, key: HoldKeyArgument, as_json: JsonOption = False) -> None:
    """Give a hold back, as `release` does."""
    release(user, meter, key, as_json=as_json)


# ---------------------------------------------------------------------------------------------------------------------
# Plans and accounts


app.command()(plans)
app.command()(usage)
app.command()(explain)
app.command()(reverse)


# ---------------------------------------------------------------------------------------------------------------------
# Operating


@dead_app.command("list")
def dead_list(
    state: Annotated[Literal["open", "replayed", "dropped"], typer.Option(help="what became of them")] = "open",
    reason: Annotated[Refusal | None, typer.Option(help="of this reason only")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Dead letters, oldest first."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        letters = dead_letters.listed(resources, state=state, reason=reason, limit=limit)
    columns = ("id", "partition", "entry_id", "reason", "detail", "created_at")
    print_rows([{name: getattr(letter, name) for name in columns} for letter in letters], as_json)


@dead_app.command("show")
def dead_show(letter: Annotated[int, typer.Argument(help="id")], as_json: JsonOption = False) -> None:
    """One dead letter with its payload."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        found = dead_letters.show(resources, letter)
    print_fields({**found._asdict(), "payload": found.payload.decode("utf-8", "backslashreplace")}, as_json)


@dead_app.command("replay")
def dead_replay(
    letters: LettersArgument = None,
    reason: AllOfReasonOption = None,
    vouch: Annotated[bool, typer.Option("--vouch", help="sign it in your own name; look at it first")] = False,
) -> None:
    """Send dead letters again, as they are; signed by this process's key if a producer had signed them."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        _dispose_of(
            resources, letters, reason, "sent again",
            lambda letter: f"sent again as entry {dead_letters.replay(resources, letter, vouch=vouch)}",
        )  # fmt: skip


@dead_app.command("drop")
def dead_drop(letters: LettersArgument = None, reason: AllOfReasonOption = None) -> None:
    """Close dead letters without sending them; the rows stay."""
    from worker.admin import dead_letters

    def drop(letter: int) -> str:
        dead_letters.drop(resources, letter)
        return f"dropped {letter}"

    with open_resources() as resources:
        _dispose_of(resources, letters, reason, "dropped", drop)


def _dispose_of(
    resources: Resources,
    letters: Sequence[int] | None,
    reason: Refusal | None,
    done: str,
    dispose: Callable[[int], str],
) -> None:
    """Do the same to one dead letter, to several, or to all open ones of a reason. What cannot be done is said, and
    does not keep the others from it; exit code 1 then. A single one raises DeadLetterError."""
    from worker.admin import dead_letters

    if bool(letters) == (reason is not None):
        raise BadInput("id: name dead letters by their ids, or all open ones of a kind by --reason")
    if letters and len(letters) == 1:
        typer.echo(dispose(letters[0]))
        return
    numbers = letters or dead_letters.open_ids(resources, str(reason))
    left = 0
    with show_progress("dead letters") as advance:
        for count, number in enumerate(numbers, start=1):
            try:
                dispose(number)
            except dead_letters.DeadLetterError as error:
                typer.echo(str(error), err=True)
                left += 1
            advance(count)
    typer.echo(f"{counted(len(numbers) - left, 'dead letter')} {done}, {left} left")
    raise typer.Exit(REFUSED if left else DONE)


@partition_app.command("pause")
def partition_pause(partition: PartitionArgument, reason: ReasonOption, by: ByOption = "operator") -> None:
    """Have workers leave a stream alone; a batch in hand is finished. Events are accepted, checks go on."""
    from worker.admin import partitions as admin_partitions

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = admin_partitions.pause(resources, stream, by, reason)
    typer.echo(f"partition {stream.name} is paused by {found.paused_by} since {found.paused_at:%FT%TZ}")


@partition_app.command("resume")
def partition_resume(partition: PartitionArgument, by: ByOption = "operator") -> None:
    """Have a stream drained again. What cannot be read of what it holds now becomes dead letters, however much."""
    from worker.admin.partitions import resume

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = resume(resources, stream, by)
    typer.echo(f"partition {stream.name} {'is resumed' if found else 'was not paused'}")


@partition_app.command("move")
def partition_move(
    stream: Annotated[int, typer.Argument(min=0, help="number of a stream beyond METERFALL_PARTITIONS")],
) -> None:
    """Send what waits in a stream that nobody drains to the streams that are drained."""
    from worker.admin.partitions import move_stranded
    from worker.keyspace.keys import Partition

    with open_resources() as resources:
        typer.echo(f"{counted(move_stranded(resources, Partition(stream)), 'entry')} moved")


@partition_app.command("list")
def partition_list(as_json: JsonOption = False) -> None:
    """Every stream with its last pause."""
    from worker.admin import partitions as admin_partitions
    from worker.keyspace.keys import streams
    from worker.ledger.partitions import Pause

    with open_resources() as resources:
        latest = admin_partitions.latest(resources)
        rows = []
        for stream in streams(resources.settings.partitions):
            pause, lag = latest.get(stream), resources.redis.xlen(stream.entries)
            state = "paused" if pause and pause.resumed_at is None else "drained"
            about = pause._asdict() if pause else dict.fromkeys(Pause._fields)
            rows.append({**about, "partition": stream.name, "state": state, "lag": lag})
    order = ("partition", "state", "lag", "paused_at", "paused_by", "reason", "resumed_at", "resumed_by")
    print_rows([{name: row[name] for name in order} for row in rows], as_json)


@spool_app.command("list")
def spool_list(limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED)] = 100, as_json: JsonOption = False) -> None:
    """What waits to be sent, oldest first."""
    from worker.client.spool_file import Spool

    settings = read_settings()
    if settings.spool_path is None:
        raise BadInput(NO_SPOOL)
    found = Spool(settings.spool_path, settings.spool_max_bytes).oldest(limit)
    rows = [(each, json.loads(each.item.content)) for each in found]
    columns = ("user_id", "meter", "event_id", "key", "request_id", "quantity", "paid")
    listed = [{"kind": row.item.kind, **{name: content.get(name) for name in columns}} for row, content in rows]
    print_rows(
        [{"id": row.id, "kept_at": row.kept_at} | said for (row, _), said in zip(rows, listed, strict=True)], as_json
    )


@spool_app.command("send")
def spool_send() -> None:
    """Send what waits, in order; what Redis does not confirm stays. Exit code 1 then."""
    if read_settings().spool_path is None:
        raise BadInput(NO_SPOOL)
    sent, left = 0, True
    with open_billing() as billing:
        while left:
            items, left = billing.send_spooled(SPOOLED_A_CALL, wait_seconds=TURN_SECONDS)
            sent += items
    typer.echo(f"{counted(sent, 'item')} sent")


@cache_app.command("reset")
def cache_reset() -> None:
    """After a restore of Postgres: start a new epoch, so that no cached balance of the old one is believed."""
    from worker.keyspace.keys import BALANCE_PATTERN, SPONSORSHIP, STANDING_PATTERN
    from worker.ledger.connection import batch_connection, new_epoch

    with open_resources() as resources:
        with batch_connection(resources.engine) as postgres:
            epoch = new_epoch(postgres)
        for pattern in (BALANCE_PATTERN, STANDING_PATTERN):
            for key in resources.redis.scan_iter(match=pattern, count=1_000):
                resources.redis.delete(key)
        resources.redis.delete(SPONSORSHIP.pool)
    typer.echo(f"epoch {epoch}")


@app.command()
def repartition(partitions: Annotated[int, typer.Argument(help="the new number of streams")]) -> None:
    """Change the number of streams, while no producer and no worker runs. Then set METERFALL_PARTITIONS alike."""
    from worker.admin.partitions import repartition as change

    with open_resources(claim=False) as resources:
        before = change(resources, partitions)
    typer.echo(f"partitions: {before} → {partitions}; set METERFALL_PARTITIONS={partitions} for every process")


@app.command()
def verify(as_json: JsonOption = False) -> None:
    """Prove every balance from the rows, and against Redis. Exit code 1 when anything differs."""
    from worker.reports.proof import verify_ledger

    with open_resources() as resources, show_progress("accounts proved") as advance:
        report = verify_ledger(resources, advance)
    print_fields(report._asdict() | {"differences": len(report.differences)}, as_json)
    for difference in report.differences:
        typer.echo(difference, err=True)
    raise typer.Exit(REFUSED if report.differences else DONE)


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Lag, age of the oldest entry, pending and throughput per partition."""
    from worker.reports.status import read_status

    with open_resources() as resources:
        found = read_status(resources)
    if as_json:
        print_json({**found._asdict(), "partitions": [partition._asdict() for partition in found.partitions]})
        return
    rows = [{**row._asdict(), "per_second": f"{row.per_second:.1f}"} for row in found.partitions]
    print_rows(rows, as_json=False)
    typer.echo(f"accounts {found.accounts}, open dead letters {found.dead_letters}, waiting jobs {found.waiting_jobs}")
    if found.emptied_at is not None:
        typer.echo(
            f"Redis was found empty at {found.emptied_at:%Y-%m-%d %H:%M:%S} UTC: holds that were open then are gone, "
            "and so are events that were not applied yet. Whoever still has such events may send them again; balances, "
            "and budgets of the pool, are read from the ledger",
            err=True,
        )
    if found.dead_by_reason:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dead_by_reason.items())
        typer.echo(f"open dead letters: {reasons}; `meterfall dead list --reason …` shows them")
    for row in found.partitions:
        if row.paused:
            typer.echo(
                f"partition {row.partition} is paused: its events are accepted, but not billed. Mend what writes them, "
                f"then `meterfall partition resume {row.partition}`"
            )
    if found.spooled:
        typer.echo(f"spooled on this machine {found.spooled}, the oldest {found.spooled_oldest_age_ms} ms ago")
    for partition, lag in found.stranded.items():
        typer.echo(
            f"{counted(lag, 'event')} in stream {partition}, which nobody drains: a producer has another "
            f"METERFALL_PARTITIONS. Set the right number there, then `meterfall partition move {partition}`",
            err=True,
        )


@app.command()
def bench(
    events: Annotated[int, typer.Option(help="drained in each round")] = 200_000,
    users: Annotated[int, typer.Option(help="accounts, few of them heavy")] = 10_000,
    rounds: Annotated[int, typer.Option(help="of which the median counts")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="one small round: does it run at all?")] = False,
    out: Annotated[Path, typer.Option(help="folder for bench.json and bench.png")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: throughput, latencies and memory, beside a bare COPY and the usual ORM consumer.

    Needs a checkout: the benchmarks are not installed.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks/bench.py").is_file():
        raise BadInput("bench: the benchmarks are not installed; run `make bench` in a checkout of the source")
    sys.path.insert(0, str(checkout))
    from benchmarks import bench as benchmark

    try:
        sizes = benchmark.QUICK if quick else benchmark.Sizes(events=events, users=users, rounds=rounds)
        report = benchmark.run(sizes, os.environ)
    except benchmark.BenchInputError as error:
        raise BadInput(str(error)) from None
    except benchmark.BenchError as error:
        _fail(str(error), REFUSED)
    if as_json:
        print_json({**report.figures, "machine": report.machine})
    else:
        print_rows(report.table(), as_json=False)
    typer.echo(report.verdict(), err=True)
    typer.echo(report.save(out), err=True)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def main() -> None:
    """Entry point of `meterfall`: run a command, turn every expected error into one line and its exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if not error.format_message():  # without arguments the help was printed
            sys.exit(BAD_INPUT)
        _fail(error.format_message(), BAD_INPUT)
    except (SettingsError, CatalogueError, BadInput) as error:
        _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever is not expected is raised again
        _fail(_refusal(error), REFUSED)
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


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"meterfall: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _address(field: str) -> str:
    """The server that was tried, without its password."""
    url = getattr(load_settings(os.environ), field)
    return without_secrets(url) if url else "unset"


def _parse_stream(text: str, partitions: int) -> Stream:
    """The partition, or the pool's stream, that an operator names. Raises BadInput."""
    from worker.keyspace.keys import SPONSORSHIP, streams

    by_name = {str(stream.name): stream for stream in streams(partitions)}
    if text not in by_name:
        raise BadInput(f"partition: 0 to {partitions - 1}, or {SPONSORSHIP.name} (got {text!r})")
    return by_name[text]


def _parsed_events(billing: Billing, lines: Iterable[str]) -> list[Any]:
    from pydantic import ValidationError

    from schemas.events import UsageEvent
    from worker.client.recording import priced
    from worker.errors import InvalidRequest

    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(priced(billing.context, UsageEvent.model_validate_json(line)))
        except InvalidRequest as error:
            raise BadInput(f"line {number}: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "event"
            raise BadInput(f"line {number}: {field}: {first['msg']}") from None
    return events


def _emit_raw(billing: Billing, lines: Sequence[str]) -> int:
    """XADD each line as it is, to the partition of the user it names."""
    from worker.keyspace.entries import plain_entry

    with billing.redis.pipeline(transaction=False) as pipe:
        for number, line in enumerate(lines, start=1):
            try:
                user_id = json.loads(line)["user_id"].encode("utf-8").decode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise BadInput(f"line {number}: user_id: missing; it decides the stream") from None
            fields = plain_entry(line.encode(), billing.context.signer)
            pipe.xadd(billing.context.partition(user_id).entries, fields)
        return len(pipe.execute())


def _print_report(report: Report, as_json: bool) -> None:
    """What a demo or a replay did: who paid what, the numbers, and on stderr each thing that is wrong."""
    if as_json:
        usage = [line._asdict() for line in report.usage]
        closed = {"closed": [period._asdict() for period in report.closed]} if report.closed else {}
        sponsored = {"sponsored": [one._asdict() for one in report.sponsored]} if report.sponsored else {}
        print_json({**report.numbers, "usage": usage, **closed, **sponsored, "faults": report.faults})
    else:
        paid = [
            {
                "plan": line.plan,
                "meter": line.meter,
                "subscription": line.from_subscription,
                "rollover": line.from_rollover,
                "purchased": line.from_purchased,
                "debt": line.overflow_to_debt,
            }
            for line in report.usage
        ]
        print_rows(paid, as_json=False)
        if report.closed:
            whose, _, _ = report.closed[0].user_id.rpartition("-")
            typer.echo(f"Periods that closed meanwhile, of the accounts {whose}-…; rollover below 0 is debt")
            print_rows([_closed_row(period) for period in report.closed], as_json=False)
        if report.sponsored:
            typer.echo("Requests to the sponsorship pool; credited is the share that it got of what the caller paid")
            print_rows([_sponsored_row(one) for one in report.sponsored], as_json=False)
        print_fields(report.numbers, as_json=False)
    for fault in report.faults:
        typer.echo(fault, err=True)


def _closed_row(period: ClosedPeriod) -> dict[str, object]:
    return {
        "account": period.user_id.rpartition("-")[2],
        "meter": period.meter,
        "ended": f"{period.period_end:%d %b}" if period.period_end else "",
        "used/granted": f"{period.used}/{period.allowance}",
        "rollover": f"{period.rollover_before} → {period.rollover_after}",
        "refill": period.refilled_to,
    }


def _sponsored_row(one: Sponsored) -> dict[str, object]:
    return {
        "caller": one.request_id.split("-")[-2],
        "served": one.served,
        "ended": one.ended,
        "held/asked": f"{one.held}/{one.estimate}",
        "absorbed": one.absorbed,
        "paid": one.paid,
        "credited": one.credited,
    }
