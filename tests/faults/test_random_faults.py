"""Scenario 30: random work under random faults, in the order of a seed. The oracle checks the books at every rest.

The test prints its seed. The same seed makes the same steps in the same order:

    FAULTS_SEED=17 make faults
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from secrets import randbelow
from typing import ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from schemas.events import UsageEvent
from tests.faults.house import METER, House, Trusting
from worker.admin import accounts, credits
from worker.client import Billing
from worker.demo.processes import children
from worker.errors import UsageDenied
from worker.keyspace import keys
from worker.resources import Resources

SEED = "FAULTS_SEED"
RUNS, STEPS = 4, 30
MONTH = timedelta(days=30)
user_numbers = st.integers(0, 7)
amounts = st.integers(1, 9)


class RandomFaults(RuleBasedStateMachine):
    """The steps of producers, operators and faults on a house while a dyno is at work in it.

    One run follows another in the same house: all events accepted in any of them must be there at every rest.
    """

    house: ClassVar[House]
    billing: ClassVar[Billing]
    resources: ClassVar[Resources]
    dyno: ClassVar[subprocess.Popen[bytes]]
    steps: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.frozen: int | None = None

    def user(self, number: int) -> str:
        return self.house.users[number]

    def fresh(self) -> str:
        """Return a new name."""
        type(self).steps += 1
        return f"step-{self.steps}"

    def used(self, number: int, name: str, amount: int) -> None:
        """Note an event that a call has recorded."""
        event = UsageEvent(event_id=name, user_id=self.user(number), meter=METER, quantity=amount, multiplier="1")
        self.house.accept([event])

    # -- Work

    @rule(number=st.integers(1, 40))
    def events_are_emitted(self, number: int) -> None:
        self.house.emit(number)

    # No precondition: the steps of a run must not depend on earlier runs, or no run could be repeated.
    @rule()
    def events_are_sent_again(self) -> None:
        if len(self.house.accepted.events) >= 5:
            self.house.resend()

    @rule()
    def nonsense_arrives(self) -> None:
        self.house.emit_nonsense()

    @rule(number=user_numbers, amount=amounts)
    def somebody_is_charged(self, number: int, amount: int) -> None:
        name = self.fresh()
        with suppress(UsageDenied):
            self.billing.charge(self.user(number), METER, amount, name)
            self.used(number, name, amount)

    @rule(number=user_numbers, amount=amounts, then=st.sampled_from(["settled", "released", "held"]))
    def something_is_held(self, number: int, amount: int, then: str) -> None:
        user, name = self.user(number), self.fresh()
        with suppress(UsageDenied):
            self.billing.reserve(user, METER, amount, name)
            if then == "settled":
                self.billing.settle(user, METER, name, 2 * amount)
                self.used(number, name, 2 * amount)
            elif then == "released":
                self.billing.release(user, METER, name)
            else:
                self.house.accepted.holds[user, METER, name] = amount

    @rule(number=user_numbers, amount=amounts, paid=st.integers(0, 50))
    def the_pool_helps(self, number: int, amount: int, paid: int) -> None:
        name = self.fresh()
        if self.billing.decide(self.user(number), amount, name).expires_at is not None:
            settled = self.billing.settle_sponsored(self.user(number), name, amount)
            self.house.accepted.grants[name] = settled.absorbed
        self.billing.credit_pool(f"paid-{name}", paid)

    @rule(number=user_numbers, amount=st.integers(1, 500))
    def somebody_buys(self, number: int, amount: int) -> None:
        name = self.fresh()
        self.recovered()
        for _ in range(2):
            credits.grant(self.resources, self.user(number), METER, amount, name)

    @rule(number=user_numbers)
    def somebody_pays_an_invoice(self, number: int) -> None:
        name = self.fresh()
        self.recovered()
        start = datetime.now(UTC) + self.steps * MONTH
        for _ in range(2):
            accounts.renew(self.resources, self.user(number), name, start, start + MONTH)

    # -- Faults

    @rule()
    def the_worker_is_killed(self) -> None:
        self.signal_worker(signal.SIGKILL)

    @rule()
    def the_worker_is_frozen(self) -> None:
        self.recovered()
        self.frozen = self.signal_worker(signal.SIGSTOP)

    @rule()
    def the_worker_goes_on(self) -> None:
        self.recovered()

    @rule()
    def sessions_are_cut_off(self) -> None:
        assert self.house.settings.database_url is not None
        with psycopg.connect(self.house.settings.database_url) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    @rule()
    def postgres_crashes(self) -> None:
        self.house.postgres.stop(signal.SIGQUIT)
        self.house.postgres.start()

    @rule()
    def redis_is_killed(self) -> None:
        self.house.redis_server.kill()
        self.house.redis_server.start()

    @rule()
    def caches_are_lost(self) -> None:
        for pattern in (keys.BALANCE_PATTERN, keys.SPONSORSHIP.pool, keys.STANDING_PATTERN):
            for name in self.house.redis.scan_iter(pattern):
                self.house.redis.delete(name)

    # -- Rest

    @rule()
    def all_is_quiet(self) -> None:
        self.recovered()
        assert self.dyno.poll() is None, "the supervisor outlives all of it"
        self.events_are_sent_again()
        self.house.wait_until_drained(60)
        self.house.prove()

    def teardown(self) -> None:
        self.all_is_quiet()

    def recovered(self) -> None:
        """Let a frozen worker go on: its locks block all others."""
        if self.frozen is not None:
            with suppress(ProcessLookupError):
                os.kill(self.frozen, signal.SIGCONT)
        self.frozen = None

    def signal_worker(self, number: signal.Signals) -> int | None:
        """Send the signal to the worker process; return its id, None without one."""
        for worker in children(self.dyno.pid):
            with suppress(ProcessLookupError):
                os.kill(worker, number)
                return worker
        return None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.scenario(number=30)
def test_the_books_are_right_after_random_faults(house: House) -> None:
    chosen = int(os.environ.get(SEED) or randbelow(2**32))
    print(f"{SEED}={chosen}")
    RandomFaults.house, RandomFaults.steps = house, 0
    # A worker killed this often by chance has not died of its batch.
    hardy = house.settings_with(poison_deaths=1_000)
    settings = hypothesis_settings(
        max_examples=RUNS,
        stateful_step_count=STEPS,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    patient = house.settings_with(lock_timeout_ms=20_000, statement_timeout_ms=25_000)
    with (
        Billing.connect(house.settings, trust=Trusting()) as billing,
        closing(Resources.open(patient)) as resources,
        house.dyno(settings=hardy) as dyno,
    ):
        RandomFaults.billing, RandomFaults.resources, RandomFaults.dyno = billing, resources, dyno
        run_state_machine_as_test(seed(chosen)(RandomFaults), settings=settings)
