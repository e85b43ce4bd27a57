"""The commands that run meterfall and look after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from schemas.codes import Refusal
from worker.cli.io import (
    DONE,
    REFUSED,
    counted,
    open_billing,
    open_resources,
    print_fields,
    print_json,
    print_rows,
    read_settings,
    show_progress,
)
from worker.cli.options import (
    AllOfReasonOption,
    ByOption,
    JsonOption,
    LettersArgument,
    LimitOption,
    PartitionArgument,
    ReasonOption,
)
from worker.errors import BadInput

if TYPE_CHECKING:
    from worker.keyspace.keys import Stream
    from worker.resources import Resources

NO_SPOOL = "METERFALL_SPOOL_PATH: unset; it names the folder of the spool"
# Items in one go, and how long to wait while another process sends.
SPOOLED_A_CALL, TURN_SECONDS = 1_000, 10.0

app = typer.Typer()
worker_app = typer.Typer(no_args_is_help=True, help="Run workers.")
dead_app = typer.Typer(no_args_is_help=True, help="Look at refused stream entries, send them again, or drop them.")
partition_app = typer.Typer(no_args_is_help=True, help="Pause and resume streams; move stream entries.")
spool_app = typer.Typer(no_args_is_help=True, help="Look at calls spooled on this machine's disk, and send them.")
cache_app = typer.Typer(no_args_is_help=True, help="Reset the balances that Redis caches.")
app.add_typer(worker_app, name="worker")
app.add_typer(dead_app, name="dead")
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
    """Run one dyno: a worker process and its supervisor. Waits for servers that do not answer."""
    from worker.consumer.supervisor import Supervisor

    raise typer.Exit(Supervisor(read_settings(), dict(os.environ)).run(burst=burst))


# ---------------------------------------------------------------------------------------------------------------------
# Status and proof


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Show lag, age of the oldest stream entry, pending and throughput per partition."""
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
            "and so are events that were not applied yet. Services may send such events again; processes read balances "
            "and budgets of the pool from the ledger",
            err=True,
        )
    if found.dead_by_reason:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dead_by_reason.items())
        typer.echo(f"open dead letters: {reasons}; `meterfall dead list --reason …` shows them")
    for row in found.partitions:
        if row.paused:
            typer.echo(
                f"partition {row.partition} is paused: Redis accepts its events, workers do not bill them. Mend the "
                f"producer, then `meterfall partition resume {row.partition}`"
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
def verify(as_json: JsonOption = False) -> None:
    """Prove every balance from its rows and against Redis. Exit code 1 if any differs."""
    from worker.reports.proof import verify_ledger

    with open_resources() as resources, show_progress("accounts proved") as advance:
        report = verify_ledger(resources, advance)
    print_fields(report._asdict() | {"differences": len(report.differences)}, as_json)
    for difference in report.differences:
        typer.echo(difference, err=True)
    raise typer.Exit(REFUSED if report.differences else DONE)


# ---------------------------------------------------------------------------------------------------------------------
# Dead letters, pauses, the spool


@dead_app.command("list")
def dead_list(
    state: Annotated[Literal["open", "replayed", "dropped"], typer.Option(help="list letters in this state")] = "open",
    reason: Annotated[Refusal | None, typer.Option(help="only letters of this reason")] = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        letters = dead_letters.listed(resources, state=state, reason=reason, limit=limit)
    columns = ("id", "partition", "entry_id", "reason", "detail", "created_at")
    print_rows([{name: getattr(letter, name) for name in columns} for letter in letters], as_json)


@dead_app.command("show")
def dead_show(letter: Annotated[int, typer.Argument(help="id")], as_json: JsonOption = False) -> None:
    """Show one dead letter with its payload."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        found = dead_letters.show(resources, letter)
    print_fields({**found._asdict(), "payload": found.payload.decode("utf-8", "backslashreplace")}, as_json)


@dead_app.command("replay")
def dead_replay(
    letters: LettersArgument = None,
    reason: AllOfReasonOption = None,
    vouch: Annotated[
        bool, typer.Option("--vouch", help="sign those without a right signature also; look at them first")
    ] = False,
) -> None:
    """Send dead letters again unchanged, signed with this process's key if a producer had signed them."""
    from worker.admin import dead_letters

    with open_resources() as resources:
        _dispose_of(
            resources, letters, reason, "sent again",
            lambda letter: f"sent again as stream entry {dead_letters.replay(resources, letter, vouch=vouch)}",
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


@partition_app.command("pause")
def partition_pause(partition: PartitionArgument, reason: ReasonOption, by: ByOption = "operator") -> None:
    """Pause a stream: workers finish the batch in hand, then leave it alone. Events are accepted, checks go on."""
    from worker.admin import partitions as admin_partitions

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = admin_partitions.pause(resources, stream, by, reason)
    typer.echo(f"partition {stream.name} is paused by {found.paused_by} since {found.paused_at:%FT%TZ}")


@partition_app.command("resume")
def partition_resume(partition: PartitionArgument, by: ByOption = "operator") -> None:
    """Resume a stream. All unreadable stream entries that it holds now become dead letters."""
    from worker.admin.partitions import resume

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = resume(resources, stream, by)
    typer.echo(f"partition {stream.name} {'is resumed' if found else 'was not paused'}")


@partition_app.command("move")
def partition_move(
    stream: Annotated[int, typer.Argument(min=0, help="number of a stream beyond METERFALL_PARTITIONS")],
) -> None:
    """Move stream entries from a stream that nobody drains to the streams of their users."""
    from worker.admin.partitions import move_stranded
    from worker.keyspace.keys import Partition

    with open_resources() as resources:
        typer.echo(f"{counted(move_stranded(resources, Partition(stream)), 'stream entry')} moved")


@partition_app.command("list")
def partition_list(as_json: JsonOption = False) -> None:
    """List every stream with its last pause."""
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
def spool_list(limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """List spooled calls, oldest first."""
    from worker.client.spool_file import Spool

    settings = read_settings()
    if settings.spool_path is None:
        raise BadInput(NO_SPOOL)
    found = Spool(settings.spool_path, settings.spool_max_bytes).oldest(limit)
    rows = [(each, json.loads(each.item.content)) for each in found]
    columns = ("user_id", "meter", "event_id", "key", "request_id", "quantity", "paid")
    listed = [{"kind": row.item.kind, **{name: content.get(name) for name in columns}} for row, content in rows]
    print_rows(
        [{"id": row.id, "kept_at": row.kept_at} | about for (row, _), about in zip(rows, listed, strict=True)], as_json
    )


@spool_app.command("send")
def spool_send() -> None:
    """Send spooled calls in order. Exit code 1 if Redis does not confirm one; that and later ones stay."""
    if read_settings().spool_path is None:
        raise BadInput(NO_SPOOL)
    sent, left = 0, True
    with open_billing() as billing:
        while left:
            items, left = billing.send_spooled(SPOOLED_A_CALL, wait_seconds=TURN_SECONDS)
            sent += items
    typer.echo(f"{counted(sent, 'item')} sent")


# ---------------------------------------------------------------------------------------------------------------------
# Rare work


@cache_app.command("reset")
def cache_reset() -> None:
    """Start a new epoch after a restore of Postgres: no process then believes an older cached balance."""
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
    """Change the number of streams while no producer and no worker runs. Then set METERFALL_PARTITIONS to it."""
    from worker.admin.partitions import repartition as change

    with open_resources(claim=False) as resources:
        before = change(resources, partitions)
    typer.echo(f"partitions: {before} → {partitions}; set METERFALL_PARTITIONS={partitions} for every process")


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _dispose_of(
    resources: Resources,
    letters: Sequence[int] | None,
    reason: Refusal | None,
    done: str,
    dispose: Callable[[int], str],
) -> None:
    """Dispose of one dead letter, of several, or of all open ones of a reason.

    Prints each letter that it cannot dispose of and goes on; exit code 1 then. A single letter raises DeadLetterError.
    """
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


def _parse_stream(text: str, partitions: int) -> Stream:
    """Return the partition or the pool's stream of this name. Raises BadInput."""
    from worker.keyspace.keys import SPONSORSHIP, streams

    by_name = {str(stream.name): stream for stream in streams(partitions)}
    if text not in by_name:
        raise BadInput(f"partition: 0 to {partitions - 1}, or {SPONSORSHIP.name} (got {text!r})")
    return by_name[text]
