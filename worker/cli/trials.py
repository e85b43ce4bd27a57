"""The commands that try meterfall out: `demo`, `replay` and `bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.errors import fail
from worker.cli.io import DONE, REFUSED, print_fields, print_json, print_rows
from worker.cli.options import JsonOption
from worker.errors import BadInput

if TYPE_CHECKING:
    from worker.demo.stage import CreditStep, Report, Sponsored, Told
    from worker.ledger.reports import ClosedPeriod

app = typer.Typer()


@app.command()
def demo(
    events: Annotated[int, typer.Option(min=1, help="pieces of work")] = 20_000,
    users: Annotated[int, typer.Option(min=1, max=100_000, help="accounts, spread over all plans")] = 1_000,
    seed: Annotated[int, typer.Option(help="the same seed makes the same load")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Run accounts, producers and workers, and prove that nothing was lost or billed twice."""
    from worker.demo.services import run_demo

    report = run_demo(os.environ, size=events, users=users, seed=seed)
    _print_report(report, as_json)
    raise typer.Exit(REFUSED if report.faults else DONE)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="CSV: TIMESTAMP,ContextTokens,GeneratedTokens")],
    speed: Annotated[
        float | None, typer.Option(min=0.001, help="multiple of the recorded pace; default as fast as possible")
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=100_000, help="accounts that share the rows")] = 1_000,
    seed: Annotated[int, typer.Option(help="draws the user of each row")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="number of rows, from the first on")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=64, help="dynos to start; default 2 on servers that it starts, else 0")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="name; the same name again bills nothing twice; default a new one")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Feed a recorded trace, wait until workers have drained it, and prove that every row was billed once."""
    from worker.demo.replay import new_run, read_trace, run_replay

    rows = read_trace(trace, limit)
    name = new_run(run)
    report = run_replay(os.environ, rows, run=name, users=users, seed=seed, speed=speed, workers=workers)
    _print_report(report, as_json)
    raise typer.Exit(REFUSED if report.faults else DONE)


@app.command()
def bench(
    events: Annotated[int, typer.Option(help="events per round")] = 200_000,
    users: Annotated[int, typer.Option(help="accounts, few of them heavy")] = 10_000,
    rounds: Annotated[int, typer.Option(help="number of rounds; the median counts")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="one small round: does it run at all?")] = False,
    out: Annotated[Path, typer.Option(help="folder for bench.json and bench.png")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Measure CPU, throughput, latencies and memory on this machine, beside a bare COPY and two usual consumers.

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
        fail(str(error), REFUSED)
    if as_json:
        print_json({**report.figures, "machine": report.machine})
    else:
        print_rows(report.table(), as_json=False)
    typer.echo(report.verdict(), err=True)
    typer.echo(report.save(out), err=True)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves


def _print_report(report: Report, as_json: bool) -> None:
    """Print the report of a demo or a replay: payments by bucket, figures, and faults on stderr."""
    if as_json:
        usage = [line._asdict() for line in report.usage]
        closed = {"closed": [period._asdict() for period in report.closed]} if report.closed else {}
        sponsored = {"sponsored": [one._asdict() for one in report.sponsored]} if report.sponsored else {}
        spent = {"spent": [step._asdict() for step in report.spent]} if report.spent else {}
        told = {"told": [notice._asdict() for notice in report.told]} if report.told else {}
        print_json({**report.numbers, "usage": usage, **closed, **sponsored, **spent, **told, "faults": report.faults})
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
            prefix, _, _ = report.closed[0].user_id.rpartition("-")
            typer.echo(f"Periods that closed meanwhile, of the accounts {prefix}-…; rollover below 0 is debt")
            print_rows([_closed_row(period) for period in report.closed], as_json=False)
        if report.sponsored:
            typer.echo("Requests to the sponsorship pool; credited is the share that it got of what the caller paid")
            print_rows([_sponsored_row(one) for one in report.sponsored], as_json=False)
        if report.spent:
            typer.echo("A wallet for several meters, a gift that ends, and a limit per day; credits are the wallet's")
            print_rows([_step_row(step) for step in report.spent], as_json=False)
        if report.told:
            typer.echo("What the account was told meanwhile; delivered counts deliveries with a right signature")
            print_rows([_told_row(notice) for notice in report.told], as_json=False)
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


def _step_row(step: CreditStep) -> dict[str, object]:
    return {"": step.what, "meter": step.meter, "units": step.units, "credits": step.credits, "by": step.says}


def _told_row(notice: Told) -> dict[str, object]:
    delivered = "in the feed" if notice.delivered is None else f"{notice.delivered} ×"
    return {
        "notice": notice.kind, "at": f"{notice.at:%H:%M:%S}", "says": notice.says, "delivered": delivered
    }  # fmt: skip
