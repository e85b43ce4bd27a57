"""The commands that run meterfall and look after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from time import sleep
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from schemas.codes import Refusal
from worker.cli.confirm import asks, confirm
from worker.cli.io import (
    DONE,
    REFUSED,
    login,
    open_billing,
    open_for_monitoring,
    open_resources,
    parse_optional_time,
    print_answer,
    print_fields,
    print_json,
    print_rows,
    read_settings,
    show_progress,
)
from worker.cli.options import (
    ActorOption,
    AllOfReasonOption,
    CauseOption,
    JsonOption,
    LetterPartitionOption,
    LetterReasonOption,
    LettersArgument,
    LetterSourceOption,
    LetterStateOption,
    LetterUserOption,
    LimitOption,
    PartitionArgument,
    ReasonOption,
    SinceOption,
    WhyOption,
    YesOption,
)
from worker.errors import AccountError, BadInput
from worker.rules.formats import moment
from worker.rules.words import counted

if TYPE_CHECKING:
    from schemas.status import Status
    from worker.keyspace.keys import Stream
    from worker.resources import Resources
    from worker.rules.account import Cause

NO_SPOOL = "METERFALL_SPOOL_PATH: unset; it names the folder of the spool"
# Items in one go, and how long to wait while another process sends.
SPOOLED_A_CALL, TURN_SECONDS = 1_000, 10.0

app = typer.Typer()
worker_app = typer.Typer(no_args_is_help=True, help="Run workers.")
dead_app = typer.Typer(no_args_is_help=True, help="Look at refused stream entries, send them again, or drop them.")
partition_app = typer.Typer(no_args_is_help=True, help="Pause and resume streams; move stream entries.")
spool_app = typer.Typer(no_args_is_help=True, help="Look at calls spooled on this machine's disk, and send them.")
pending_app = typer.Typer(no_args_is_help=True, help="Free pending units of events that were lost.")
cache_app = typer.Typer(no_args_is_help=True, help="Reset cached balances; acknowledge that Redis lost its data.")
app.add_typer(worker_app, name="worker")
app.add_typer(dead_app, name="dead")
app.add_typer(partition_app, name="partition")
app.add_typer(spool_app, name="spool")
app.add_typer(cache_app, name="cache")
app.add_typer(pending_app, name="pending")


# ---------------------------------------------------------------------------------------------------------------------
# Set-up and workers


@app.command()
def migrate(
    revision: Annotated[str, typer.Argument(help="head, base, or a number: forward or back")] = "head",
    check: Annotated[bool, typer.Option("--check", help="only compare; exit code 1 if they differ")] = False,
    sql: Annotated[bool, typer.Option("--sql", help="only print the statements")] = False,
    destroy: Annotated[
        str | None, typer.Option(metavar="DATABASE", help="name of the database whose rows a step back may destroy")
    ] = None,
    roles: Annotated[
        bool, typer.Option("--roles", help="then grant the roles of config/postgres-roles.sql their rights")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the ledger's tables to a revision, while workers go on. A step back that drops rows wants --destroy.

    Logs in as METERFALL_MIGRATE_URL says, else as DATABASE_URL.
    """
    from worker.ledger import migrate as ledger_migrate

    settings = read_settings()
    url = settings.migrate_url or settings.database_url
    if url is None:
        raise BadInput("DATABASE_URL: unset; it names the Postgres to migrate")
    if settings.database_pooled and settings.migrate_url is None:
        raise BadInput("METERFALL_MIGRATE_URL: unset; DATABASE_URL names a pooler, and migrations need Postgres itself")
    if check and sql:
        raise BadInput("--check: not together with --sql")
    if sql and as_json:
        raise BadInput("--json: not together with --sql, which prints statements")
    schema = settings.database_schema
    if check:
        _check_revision(url, schema, revision, as_json)
    elif sql:
        typer.echo(ledger_migrate.statements(url, revision, schema=schema), nl=False)
    else:
        _refuse_destruction(url, schema, revision, destroy)
        ledger_migrate.migrate(url, revision, settings.migrate_patience_seconds, schema=schema)
        if not as_json:
            typer.echo(f"ledger is at {revision}")
        if roles:
            ledger_migrate.grant_roles(url, schema=schema)
        if as_json:
            print_json({"revision": revision, "roles": roles})
        elif roles:
            typer.echo("roles have their rights")


@worker_app.command("run")
def worker_run(
    burst: Annotated[
        bool, typer.Option(help="end when every stream is empty, but for what is halted, paused or waits")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, max=64, help="worker processes of this dyno")] = 1,
) -> None:
    """Run one dyno: worker processes and their supervisor. Waits for servers that do not answer."""
    from worker.consumer import sentry
    from worker.consumer.supervisor import Supervisor

    settings = read_settings()
    sentry.set_up(os.environ)
    raise typer.Exit(Supervisor(settings, dict(os.environ), processes).run(burst=burst))


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="instead of METERFALL_SERVE_PORT")] = None,
    host: Annotated[str | None, typer.Option(help="instead of METERFALL_SERVE_HOST")] = None,
    processes: Annotated[int | None, typer.Option(min=1, max=64, help="instead of METERFALL_SERVE_PROCESSES")] = None,
) -> None:
    """Answer services and hosts over HTTP, until SIGTERM. Wants API keys; docs/http.md has the paths."""
    from config.settings import variable_name

    for field, value in (("serve_port", port), ("serve_host", host), ("serve_processes", processes)):
        if value is not None:
            os.environ[variable_name(field)] = str(value)  # its processes read it there
    settings = read_settings()
    try:
        from worker.service import run
    except ModuleNotFoundError as error:
        raise BadInput(f"serve: {error}; install its packages: pip install 'meterfall[serve]'") from None
    run.serve(settings)


# ---------------------------------------------------------------------------------------------------------------------
# Status and proof


@app.command()
def status(
    watch: Annotated[
        float | None, typer.Option(min=0.5, help="show it again every so many seconds, until Ctrl-C", metavar="SECONDS")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show verdict, totals and all that is remarkable. Exit code 1 if anything is degraded or down."""
    from worker.reports.status import read_status

    with open_for_monitoring() as resources:
        found = read_status(resources)
        while watch is not None:
            # Home, the lines, and the rest of the screen empty: no flicker.
            screen = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
            typer.echo(screen + _status_text(found, as_json))
            sleep(watch)
            found = read_status(resources)
    typer.echo(_status_text(found, as_json))
    raise typer.Exit(DONE if found.severity == "ok" else REFUSED)


def _status_text(found: Status, as_json: bool) -> str:
    from worker.cli.status_text import status_lines

    return found.model_dump_json(indent=2) if as_json else "\n".join(status_lines(found))


@app.command()
def health(
    max_lag_seconds: Annotated[
        int | None, typer.Option(min=1, help="limit for the age of waiting events; default of the settings")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the system: one line for each failed check, none if all is well. Exit code 1 if any failed."""
    from worker.reports.status import health_of, read_status

    with open_for_monitoring() as resources:
        found = health_of(read_status(resources, max_lag_seconds))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        for one in found.findings:
            typer.echo(" ".join(f"{one.severity} {one.check}: {one.text.rstrip('.')}; {one.remedy}".split()))
    raise typer.Exit(DONE if found.severity == "ok" else REFUSED)


@app.command()
def verify(
    full: Annotated[bool, typer.Option("--full", help="every account from its first change on")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove every balance from its rows and against Redis. Exit code 1 if any differs.

    Each account goes on from its checkpoint, and a thirtieth of them begins at zero every day.
    """
    from worker.reports.proof_result import keep_result
    from worker.reports.proof_run import prove_ledger

    with open_resources() as resources, show_progress("accounts proved") as advance:
        report = prove_ledger(resources, advance, whole=full)
        keep_result(resources.redis, report, len(report.found))
    names = ("accounts", "from_zero", "from_checkpoint", "changes", "pending_maps")
    scope = {name: getattr(report, name) for name in names}
    if as_json:
        print_json(scope | {"differences": [difference.model_dump() for difference in report.found]})
    else:
        print_fields(scope | {"differences": len(report.found)}, as_json=False)
        for difference in report.differences:
            typer.echo(difference, err=True)
    raise typer.Exit(REFUSED if report.differences else DONE)


# ---------------------------------------------------------------------------------------------------------------------
# Dead letters, pauses, the spool


@dead_app.command("list")
def dead_list(
    state: LetterStateOption = "open",
    reason: LetterReasonOption = None,
    partition: LetterPartitionOption = None,
    user: LetterUserOption = None,
    source: LetterSourceOption = None,
    since: SinceOption = None,
    after: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="only letters with a greater id")] = 0,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first, and say how many there are in all; those not open with who, when and why."""
    from worker.admin import dead_letters
    from worker.ledger.dead_letters import Wanted

    wanted = Wanted(state, reason, partition, parse_optional_time("--since", since), user, source)
    with open_resources() as resources:
        letters, total = dead_letters.page(resources, wanted, after=after, limit=limit)
    columns = ["id", "partition", "entry_id", "reason", "detail", "created_at"]
    if state != "open":
        columns += ["resolved_at", "resolved_by", "resolved_reason", "resolved_letters"]
    print_rows([{name: getattr(letter, name) for name in columns} for letter in letters], as_json)
    if len(letters) == limit and total > limit:
        typer.echo(f"{len(letters):,} of {total:,}; the next: --after {letters[-1].id}", err=True)


@dead_app.command("summary")
def dead_summary(
    by: Annotated[
        Literal["reason", "partition", "source"], typer.Option(help="a group has one reason, and one of this")
    ] = "reason",
    state: LetterStateOption = "open",
    reason: LetterReasonOption = None,
    partition: LetterPartitionOption = None,
    user: LetterUserOption = None,
    source: LetterSourceOption = None,
    since: SinceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count dead letters by reason, with the oldest, the newest, and what to do about them."""
    from worker.admin import dead_letters
    from worker.ledger.dead_letters import Wanted
    from worker.rules.remedies import remedy_of

    wanted = Wanted(state, reason, partition, parse_optional_time("--since", since), user, source)
    with open_resources() as resources:
        groups = dead_letters.summary(resources, wanted, by)
    rows = [
        {
            "reason": group.reason,
            **({} if by == "reason" else {by: group.value}),
            "letters": group.letters,
            "oldest": group.oldest,
            "newest": group.newest,
        }
        for group in groups
    ]
    if as_json:
        print_json([{**row, "remedy": remedy_of(group.reason)} for row, group in zip(rows, groups, strict=True)])
        return
    print_rows(rows, as_json=False)
    for name in dict.fromkeys(group.reason for group in groups):
        typer.echo(f"{name}: {remedy_of(name)}")


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
    by: ActorOption = None,
    why: WhyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters again unchanged, signed with this process's key if a producer had signed them."""
    from worker.admin import dead_letters

    def replay(letter: int, cause: Cause, number: int) -> _Resolved:
        entry = dead_letters.replay(resources, letter, vouch=vouch, cause=cause, letters=number)
        return _Resolved(f"sent again as stream entry {entry}", {"id": letter, "entry_id": entry})

    with open_resources() as resources:
        _dispose_of(resources, letters, reason, "sent again", replay, by=by, why=why, yes=yes, as_json=as_json)


@dead_app.command("drop")
def dead_drop(
    letters: LettersArgument = None,
    reason: AllOfReasonOption = None,
    by: ActorOption = None,
    why: WhyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Close dead letters without sending them; the rows stay, with who dropped them, when and why."""
    from worker.admin import dead_letters

    def drop(letter: int, cause: Cause, number: int) -> _Resolved:
        dead_letters.drop(resources, letter, cause=cause, letters=number)
        return _Resolved(f"dropped {letter}", {"id": letter})

    with open_resources() as resources:
        _dispose_of(resources, letters, reason, "dropped", drop, by=by, why=why, yes=yes, as_json=as_json)


@partition_app.command("pause")
def partition_pause(
    partition: PartitionArgument, reason: ReasonOption, by: ActorOption = None, as_json: JsonOption = False
) -> None:
    """Pause a stream: workers finish the batch in hand, then leave it alone. Events are accepted, checks go on."""
    from worker.admin import partitions as admin_partitions

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = admin_partitions.pause(resources, stream, login(by), reason)
    sentence = f"partition {stream.name} is paused by {found.paused_by} since {moment(found.paused_at)}"
    fields = {"partition": stream.name, "reason": found.reason, "paused_by": found.paused_by}
    print_answer(sentence, {**fields, "paused_at": found.paused_at}, as_json)


@partition_app.command("resume")
def partition_resume(partition: PartitionArgument, by: ActorOption = None, as_json: JsonOption = False) -> None:
    """Resume a stream. All unreadable stream entries that it holds now become dead letters."""
    from worker.admin.partitions import resume

    with open_resources() as resources:
        stream = _parse_stream(partition, resources.settings.partitions)
        found = resume(resources, stream, login(by))
    sentence = f"partition {stream.name} {'is resumed' if found else 'was not paused'}"
    print_answer(sentence, {"partition": stream.name, "resumed": bool(found)}, as_json)


@partition_app.command("move")
def partition_move(
    stream: Annotated[int, typer.Argument(min=0, help="number of a stream beyond METERFALL_PARTITIONS")],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move stream entries from a stream that nobody drains to the streams of their users."""
    from worker.admin.partitions import move_stranded
    from worker.keyspace.keys import Partition

    stranded = Partition(stream)
    with open_resources() as resources:
        if (waiting := resources.redis.xlen(stranded.entries)) > resources.settings.confirm_items:
            confirm(f"{counted(waiting, 'stream entry')} would be moved", yes=yes, is_final=False)
        moved = move_stranded(resources, stranded)
    print_answer(f"{counted(moved, 'stream entry')} moved", {"partition": stranded.name, "moved": moved}, as_json)


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
def spool_send(as_json: JsonOption = False) -> None:
    """Send spooled calls in order. Exit code 1 if Redis does not confirm one; that and later ones stay."""
    if read_settings().spool_path is None:
        raise BadInput(NO_SPOOL)
    sent, left = 0, True
    with open_billing() as billing:
        while left:
            items, left = billing.send_spooled(SPOOLED_A_CALL, wait_seconds=TURN_SECONDS)
            sent += items
    print_answer(f"{counted(sent, 'item')} sent", {"sent": sent}, as_json)


# ---------------------------------------------------------------------------------------------------------------------
# Rare work


@pending_app.command("reconcile")
def pending_reconcile(
    by: ActorOption = None, reason: CauseOption = None, yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Free pending units of events whose stream entries are lost; the ledger keeps a record of each."""
    from worker.admin.losses import find_stuck, reconcile

    with open_resources() as resources:
        if asks(yes=yes, is_final=False):
            found = [each for search in find_stuck(resources).values() for each in search.stuck]
            if len(found) > resources.settings.confirm_items:
                freed = f"{counted(len(found), 'pending event')} of {sum(each.units for each in found):,} units"
                confirm(f"{freed} would be freed", yes=yes, is_final=False)
        done = reconcile(resources, actor=login(by), reason=reason)
    print_rows([row._asdict() for row in done.freed], as_json)
    if not as_json:
        for stream, lost in done.lost.items():
            typer.echo(f"partition {stream.name}: {lost} stream entries were lost")
        typer.echo(f"{counted(len(done.freed), 'pending event')} freed; send them again to have them billed")


@cache_app.command("reset")
def cache_reset(yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Start a new epoch after a restore of Postgres: no process then believes an older cached balance."""
    from worker.keyspace.keys import BALANCE_PATTERN, SPONSORSHIP, STANDING_PATTERN
    from worker.ledger.connection import batch_connection, new_epoch

    with open_resources() as resources:
        if asks(yes=yes, is_final=False):
            cached = sum(1 for _ in resources.redis.scan_iter(match=BALANCE_PATTERN, count=1_000))
            if cached > resources.settings.confirm_items:
                confirm(f"{counted(cached, 'cached balance')} would be forgotten", yes=yes, is_final=False)
        with batch_connection(resources.engine) as postgres:
            epoch = new_epoch(postgres)
        for pattern in (BALANCE_PATTERN, STANDING_PATTERN):
            for key in resources.redis.scan_iter(match=pattern, count=1_000):
                resources.redis.delete(key)
        resources.redis.delete(SPONSORSHIP.pool)
    print_answer(f"epoch {epoch}", {"epoch": epoch}, as_json)


@cache_app.command("acknowledge")
def cache_acknowledge(reason: ReasonOption, by: ActorOption = None, as_json: JsonOption = False) -> None:
    """Acknowledge that Redis lost its data: `status` and `health` say no more of it. A later loss is said anew."""
    from worker.admin.lives import acknowledge

    with open_resources(claim=False) as resources:
        done = acknowledge(resources, actor=login(by), reason=reason)
    columns = ("began_at", "found", "acknowledged_at", "acknowledged_by", "reason")
    print_rows([{name: getattr(life, name) for name in columns} for life in done], as_json)
    if not as_json:
        typer.echo(f"{counted(len(done), 'loss')} of Redis acknowledged")


@app.command()
def repartition(
    partitions: Annotated[int, typer.Argument(help="the new number of streams")],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change the number of streams while no producer and no worker runs. Then set METERFALL_PARTITIONS to it."""
    from worker.admin.partitions import repartition as change
    from worker.ledger.connection import batch_connection
    from worker.ledger.partitions import read_partitions

    with open_resources(claim=False) as resources:
        if asks(yes=yes, is_final=False):
            with batch_connection(resources.engine) as postgres:
                now = read_partitions(postgres)
            if now not in (None, partitions):
                confirm(f"partitions: {now} → {partitions}", yes=yes, is_final=False)
        before = change(resources, partitions)
    sentence = f"partitions: {before} → {partitions}; set METERFALL_PARTITIONS={partitions} for every process"
    print_answer(sentence, {"before": before, "after": partitions}, as_json)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _check_revision(database_url: str, schema: str | None, revision: str, as_json: bool) -> None:
    """Print the revision of the tables and the wanted one. Exit code 1 if they differ."""
    from worker.ledger.migrate import revisions

    current, head = revisions(database_url, schema=schema)
    at, wanted = current or "base", head if revision == "head" else revision
    print_answer(f"tables are {at}, wanted {wanted}", {"revision": at, "wanted": wanted}, as_json)
    raise typer.Exit(DONE if at == wanted else REFUSED)


def _refuse_destruction(database_url: str, schema: str | None, revision: str, destroy: str | None) -> None:
    """Refuse a step back that drops rows, unless the operator names the database. Raises BadInput."""
    from worker.ledger.migrate import losses

    database, tables = losses(database_url, revision, schema=schema)
    if not tables or destroy == database:
        return
    lost = ", ".join(f"{loss.table} {'' if loss.exact else 'about '}{loss.rows:,}" for loss in tables)
    if destroy is not None:
        raise BadInput(f"--destroy: {destroy!r} is not this database, {database}. It would lose rows of {lost}")
    raise BadInput(
        f"revision: {revision} would destroy rows of {lost}. Nothing was done; make a backup, then say "
        f"--destroy {database}"
    )


class _Resolved(NamedTuple):
    """What became of a dead letter, for people and for JSON."""

    sentence: str
    fields: dict[str, object]


def _dispose_of(
    resources: Resources,
    letters: Sequence[int] | None,
    reason: Refusal | None,
    done: str,
    dispose: Callable[[int, Cause, int], _Resolved],
    *,
    by: str | None,
    why: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Dispose of one dead letter, of several, or of all open ones of a reason.

    Asks before it disposes of more than a few by their reason; letters that come meanwhile stay.
    Prints each letter that it cannot dispose of and goes on; exit code 1 then. A single letter raises DeadLetterError.
    `by` and `why` are kept with each.
    """
    from worker.admin import dead_letters
    from worker.admin.change import cause_of

    if bool(letters) == (reason is not None):
        raise BadInput("id: name dead letters by their ids, or all open ones of a kind by --reason")
    try:
        cause = cause_of(login(by), why)
    except AccountError as error:  # here --reason is the code of the letters
        raise BadInput(str(error).replace("reason:", "why:", 1)) from None
    if letters and len(letters) == 1:
        resolved = dispose(letters[0], cause, 1)
        print_answer(resolved.sentence, {"resolved": [resolved.fields], "left": []}, as_json)
        return
    numbers = letters or dead_letters.open_ids(resources, str(reason))
    if reason is not None and len(numbers) > resources.settings.confirm_items:
        span = f"ids {numbers[0]} to {numbers[-1]}"
        confirm(
            f"{len(numbers):,} open dead letters of reason {reason.value} ({span}) would be {done}",
            yes=yes,
            is_final=True,
        )
    resolved_letters, left = [], []
    with show_progress("dead letters") as advance:
        for count, number in enumerate(numbers, start=1):
            try:
                resolved_letters.append(dispose(number, cause, len(numbers)).fields)
            except dead_letters.DeadLetterError as error:
                typer.echo(str(error), err=True)
                left.append({"id": number, "error": str(error)})
            advance(count)
    sentence = f"{counted(len(resolved_letters), 'dead letter')} {done}, {len(left):,} left"
    print_answer(sentence, {"resolved": resolved_letters, "left": left}, as_json)
    raise typer.Exit(REFUSED if left else DONE)


def _parse_stream(text: str, partitions: int) -> Stream:
    """Return the partition or the pool's stream of this name. Raises BadInput."""
    from worker.keyspace.keys import SPONSORSHIP, streams

    by_name = {str(stream.name): stream for stream in streams(partitions)}
    if text not in by_name:
        raise BadInput(f"partition: 0 to {partitions - 1}, or {SPONSORSHIP.name} (got {text!r})")
    return by_name[text]
