"""The commands, `meterfall …`."""

from worker.cli.operate import app, main

__all__ = ["app", "main"]
