"""The start of `meterfall …`, and of `python -m worker …`. It imports nothing heavy: ^C meets no half-made import."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> None:
    """Run the command that the arguments name. ^C ends it with code 130 and no traceback, from the first import on.

    A process that ignores ^C, as one in the background does, goes on ignoring it.
    """
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heard:
        signal.signal(signal.SIGINT, _end_at_once)
    from worker.cli import main as run_command

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command()


def _end_at_once(_signal: int, _frame: object) -> NoReturn:
    os._exit(130)  # nothing has begun


if __name__ == "__main__":
    main()
