"""A proof of all balances that a person starts: one at a time, in a thread of its own."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from threading import Event, Lock, Thread

from loguru import logger

from config.log import described, name_in_logs
from config.settings import Settings
from worker.reports.proof_result import keep_result
from worker.reports.proof_run import prove_ledger
from worker.resources import Resources


@dataclass(frozen=True)
class Running:
    """A proof that a person started: who and when, how many accounts it has proved, and how it ended."""

    by: str
    began_at: datetime
    accounts: int = 0
    error: str | None = None
    is_over: bool = False


class Prover:
    """Proves the whole ledger when a person asks, as `meterfall verify` does. Threads may share it.

    It keeps checkpoints, so a proof that was stopped or killed has lost nothing, and the next one goes on from them.
    Its result is kept for `status`, as that of a dyno is.
    """

    def __init__(self, settings: Settings) -> None:
        """Do nothing yet."""
        self._settings = settings
        self._lock = Lock()
        self._stops = Event()
        self._running: Running | None = None
        self._thread: Thread | None = None

    @property
    def running(self) -> Running | None:
        """The proof under way in this process, or the last one; None before the first."""
        return self._running

    def start(self, by: str) -> bool:
        """Begin a proof; return False if one is under way in this process."""
        with self._lock:
            if self._stops.is_set() or (self._running is not None and not self._running.is_over):
                return False
            self._running = Running(by, datetime.now(UTC))
            self._thread = Thread(target=self._run, args=(self._running,), name="meterfall-console-proof", daemon=True)
            self._thread.start()
            return True

    def close(self) -> None:
        """Stop a proof under way after its next step, and wait for it."""
        self._stops.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, began: Running) -> None:
        def note(accounts: int) -> None:
            self._running = replace(began, accounts=accounts)
            if self._stops.is_set():
                raise _Stopped

        error = None
        try:
            with closing(Resources.open(self._settings)) as resources:
                resources.take_up_catalogues()
                how = self._settings.log_user_ids
                report = prove_ledger(resources, note, named=lambda user_id: name_in_logs(user_id, how))
                keep_result(resources.redis, report, len(report.found))
                logger.info("{} proved {} accounts: {} differ", began.by, report.accounts, len(report.found))
        except _Stopped:
            error = "the service stopped it"
        except Exception as caught:  # noqa: BLE001 - the page and the log say it; the thread has no caller
            error = f"{type(caught).__name__}; the log of the service says more"
            logger.bind(cause="console: proof").error("a proof failed: {}", described(caught))
        self._running = replace(self._running or began, error=error, is_over=True)


class _Stopped(Exception):
    """The service ends while a proof is under way."""
