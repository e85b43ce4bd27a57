"""`python -m tests.soak`: see `make soak`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from config.log import configure_logging
from tests.soak.faults import FAULTS
from tests.soak.run import Plan, run


def main() -> int:
    """Soak, print the report, and save it. Exit code 1 if it has a failure."""
    arguments = _arguments()
    configure_logging("WARNING")
    print(f"soak: seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    try:
        report = run(Plan(arguments.minutes, arguments.seed, arguments.faults, gap_seconds=arguments.gap))
    except KeyboardInterrupt:
        print("interrupted; everything is stopped", file=sys.stderr)
        return 130
    table = Table(show_header=False, title=f"soak, seed {report.seed}")
    for row in report.table():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(report.save(arguments.out))
    failures = report.failures()
    if not failures:
        print("passed: nothing lost, nothing twice, nothing grew, and work always went on in time")
        return 0
    for name, log in report.logs.items():
        (arguments.out / f"soak-{name}.log").write_text(log, encoding="utf-8")
    for failure in failures[:50]:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(
        f"{len(failures)} findings. Again with: make soak MINUTES={arguments.minutes:g} SEED={arguments.seed}; "
        f"the logs of all processes are in {arguments.out}/",
        file=sys.stderr,
    )
    return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=1, help="what load and which faults")
    parser.add_argument("--gap", type=float, default=3.0, help="seconds between two faults, on average")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for soak.json and soak.png")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=list(FAULTS), help=f"some of {', '.join(FAULTS)}"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
