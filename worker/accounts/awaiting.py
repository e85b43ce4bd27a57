"""`AsyncAccounts`: the same as `Accounts` for asyncio, in threads of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from functools import partial
from typing import Literal, ParamSpec, Self, TypeVar

from config.settings import Settings, load_settings
from schemas.notices import NoticeFeed
from schemas.overviews import (
    DebtorsReport,
    NearLimitReport,
    PurchasedReport,
    TopReport,
    UncollectedReport,
    UsageReport,
)
from schemas.reports import (
    AccountLimits,
    Breakdown,
    Credits,
    Engagement,
    EventPage,
    Explanation,
    FoundAccounts,
    Timeline,
    UsageSummary,
)
from worker.accounts.blocking import Accounts
from worker.errors import ClientClosed
from worker.rules.account import Account, ChangeAnswer

P = ParamSpec("P")
T = TypeVar("T")


class AsyncAccounts:
    """Open, change and read accounts for asyncio; each call runs in one of a few threads of its own.

    The methods, their answers and their errors are those of `Accounts`. A call that is cancelled may go on in its
    thread; repeat it to learn its outcome.
    """

    def __init__(self, accounts: Accounts, threads: int) -> None:
        self._accounts = accounts
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="meterfall-accounts")
        self._is_closed = False

    @classmethod
    def connect(cls, settings: Settings | None = None) -> Self:
        """Open from `settings`, or from the environment. See `Accounts.connect`."""
        settings = settings or load_settings(os.environ)
        return cls(Accounts(settings), settings.database_pool_size)

    async def close(self) -> None:
        """Give the connections back, after the calls under way. Calls after this raise ClientClosed."""
        self._is_closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._accounts.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(
        self,
        user_id: str,
        plan: str,
        *,
        status: str = "active",
        period_start: datetime | None = None,
        period_end: datetime | None = None,
        rollover: Mapping[str, int] | None = None,
        timezone: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.open`."""
        return await self._run(
            self._accounts.open,
            user_id,
            plan,
            status=status,
            period_start=period_start,
            period_end=period_end,
            rollover=rollover,
            timezone=timezone,
            actor=actor,
            reason=reason,
        )

    async def show(self, user_id: str) -> Account:
        """See `Accounts.show`."""
        return await self._run(self._accounts.show, user_id)

    async def find(
        self,
        *,
        user_id: str | None = None,
        prefix: str | None = None,
        log_name: str | None = None,
        plan: str | None = None,
        status: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> FoundAccounts:
        """See `Accounts.find`."""
        return await self._run(
            self._accounts.find,
            user_id=user_id,
            prefix=prefix,
            log_name=log_name,
            plan=plan,
            status=status,
            after=after,
            limit=limit,
        )

    async def usage(self, user_id: str) -> UsageSummary:
        """See `Accounts.usage`."""
        return await self._run(self._accounts.usage, user_id)

    async def breakdown(self, user_id: str, *, documents: int = 200, after: str | None = None) -> Breakdown:
        """See `Accounts.breakdown`."""
        return await self._run(self._accounts.breakdown, user_id, documents=documents, after=after)

    async def engagement(self, user_id: str) -> Engagement:
        """See `Accounts.engagement`."""
        return await self._run(self._accounts.engagement, user_id)

    async def timeline(self, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> Timeline:
        """See `Accounts.timeline`."""
        return await self._run(self._accounts.timeline, user_id, limit=limit, before_seq=before_seq)

    async def events(self, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> EventPage:
        """See `Accounts.events`."""
        return await self._run(self._accounts.events, user_id, limit=limit, before_seq=before_seq)

    async def explain(self, user_id: str, event_id: str) -> Explanation:
        """See `Accounts.explain`."""
        return await self._run(self._accounts.explain, user_id, event_id)

    async def report_usage(
        self,
        since: date | None = None,
        until: date | None = None,
        *,
        by: Sequence[str] = ("meter",),
        meter: str | None = None,
        plan: str | None = None,
        limit: int = 1_000,
    ) -> UsageReport:
        """See `Accounts.report_usage`."""
        return await self._run(self._accounts.report_usage, since, until, by=by, meter=meter, plan=plan, limit=limit)

    async def report_top(
        self, since: date | None = None, until: date | None = None, *, meter: str | None = None, limit: int = 10
    ) -> TopReport:
        """See `Accounts.report_top`."""
        return await self._run(self._accounts.report_top, since, until, meter=meter, limit=limit)

    async def report_near_limit(
        self, percent: int | None = None, *, meter: str | None = None, limit: int = 1_000
    ) -> NearLimitReport:
        """See `Accounts.report_near_limit`."""
        return await self._run(self._accounts.report_near_limit, percent, meter=meter, limit=limit)

    async def report_debtors(self, *, meter: str | None = None, limit: int = 1_000) -> DebtorsReport:
        """See `Accounts.report_debtors`."""
        return await self._run(self._accounts.report_debtors, meter=meter, limit=limit)

    async def report_purchased(
        self, by: Literal["meter", "account"] = "meter", *, meter: str | None = None, limit: int = 1_000
    ) -> PurchasedReport:
        """See `Accounts.report_purchased`."""
        return await self._run(self._accounts.report_purchased, by, meter=meter, limit=limit)

    async def report_uncollected(
        self, since: date | None = None, until: date | None = None, *, meter: str | None = None, limit: int = 1_000
    ) -> UncollectedReport:
        """See `Accounts.report_uncollected`."""
        return await self._run(self._accounts.report_uncollected, since, until, meter=meter, limit=limit)

    async def grant(
        self,
        user_id: str,
        meter: str,
        amount: int,
        key: str,
        *,
        category: str = "paid",
        priority: int = 50,
        effective_at: datetime | None = None,
        expires_at: datetime | None = None,
        open_plan: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.grant`."""
        return await self._run(
            self._accounts.grant,
            user_id,
            meter,
            amount,
            key,
            category=category,
            priority=priority,
            effective_at=effective_at,
            expires_at=expires_at,
            open_plan=open_plan,
            actor=actor,
            reason=reason,
        )

    async def credits(self, user_id: str) -> Credits:
        """See `Accounts.credits`."""
        return await self._run(self._accounts.credits, user_id)

    async def claw_back(
        self,
        user_id: str,
        meter: str,
        amount: int | None = None,
        key: str | None = None,
        *,
        order: str | None = None,
        total_refunded: int | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.claw_back`."""
        return await self._run(
            self._accounts.claw_back,
            user_id,
            meter,
            amount,
            key,
            order=order,
            total_refunded=total_refunded,
            actor=actor,
            reason=reason,
        )

    async def adjust(
        self,
        user_id: str,
        meter: str,
        *,
        rollover: int = 0,
        purchased: int = 0,
        used: int = 0,
        key: str,
        actor: str,
        reason: str,
    ) -> ChangeAnswer:
        """See `Accounts.adjust`."""
        return await self._run(
            self._accounts.adjust,
            user_id,
            meter,
            rollover=rollover,
            purchased=purchased,
            used=used,
            key=key,
            actor=actor,
            reason=reason,
        )

    async def forgive_debt(
        self,
        user_id: str,
        meter: str,
        amount: int | None = None,
        *,
        key: str,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.forgive_debt`."""
        return await self._run(self._accounts.forgive_debt, user_id, meter, amount, key=key, actor=actor, reason=reason)

    async def undo(
        self,
        user_id: str,
        entry: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.undo`."""
        return await self._run(self._accounts.undo, user_id, entry, actor=actor, reason=reason)

    async def reverse(
        self, user_id: str, event_id: str, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """See `Accounts.reverse`."""
        return await self._run(self._accounts.reverse, user_id, event_id, actor=actor, reason=reason)

    async def renew(
        self,
        user_id: str,
        invoice_id: str,
        period_start: datetime,
        period_end: datetime,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.renew`."""
        return await self._run(
            self._accounts.renew, user_id, invoice_id, period_start, period_end, actor=actor, reason=reason
        )

    async def change_plan(
        self,
        user_id: str,
        plan: str,
        *,
        at: Literal["now", "period_end"] | datetime = "now",
        period_end: datetime | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.change_plan`."""
        return await self._run(
            self._accounts.change_plan, user_id, plan, at=at, period_end=period_end, actor=actor, reason=reason
        )

    async def set_status(
        self,
        user_id: str,
        status: str,
        *,
        at: Literal["now", "period_end"] | datetime = "now",
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.set_status`."""
        return await self._run(self._accounts.set_status, user_id, status, at=at, actor=actor, reason=reason)

    async def set_period(
        self,
        user_id: str,
        period_end: datetime,
        key: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.set_period`."""
        return await self._run(self._accounts.set_period, user_id, period_end, key, actor=actor, reason=reason)

    async def set_timezone(
        self, user_id: str, timezone: str | None, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """See `Accounts.set_timezone`."""
        return await self._run(self._accounts.set_timezone, user_id, timezone, actor=actor, reason=reason)

    async def set_limit(
        self,
        user_id: str,
        meter: str,
        per: str,
        amount: int | None,
        key: str | None = None,
        *,
        of: str = "operator",
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.set_limit`."""
        return await self._run(
            self._accounts.set_limit, user_id, meter, per, amount, key, of=of, actor=actor, reason=reason
        )

    async def limits(self, user_id: str) -> AccountLimits:
        """See `Accounts.limits`."""
        return await self._run(self._accounts.limits, user_id)

    async def set_pay_from(
        self, user_id: str, pay_from: str | None, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """See `Accounts.set_pay_from`."""
        return await self._run(self._accounts.set_pay_from, user_id, pay_from, actor=actor, reason=reason)

    async def set_notices(
        self,
        user_id: str,
        rules: Sequence[Mapping[str, object]] | None,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.set_notices`."""
        return await self._run(self._accounts.set_notices, user_id, rules, actor=actor, reason=reason)

    async def notices(
        self,
        *,
        after: int = 0,
        limit: int = 100,
        kinds: Sequence[str] | None = None,
        user_id: str | None = None,
    ) -> NoticeFeed:
        """See `Accounts.notices`."""
        return await self._run(self._accounts.notices, after=after, limit=limit, kinds=kinds, user_id=user_id)

    async def set_trust(
        self, user_id: str, trust: str, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """See `Accounts.set_trust`."""
        return await self._run(self._accounts.set_trust, user_id, trust, actor=actor, reason=reason)

    async def seed(
        self,
        user_id: str,
        amount: int | None = None,
        *,
        meter: str = "credits",
        plan: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.seed`."""
        return await self._run(self._accounts.seed, user_id, amount, meter=meter, plan=plan, actor=actor, reason=reason)

    async def carry_over(
        self,
        from_user: str,
        to_user: str,
        key: str,
        *,
        meter: str = "credits",
        with_debt: bool = False,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """See `Accounts.carry_over`."""
        return await self._run(
            self._accounts.carry_over,
            from_user,
            to_user,
            key,
            meter=meter,
            with_debt=with_debt,
            actor=actor,
            reason=reason,
        )

    async def close_account(
        self, user_id: str, *, forfeit: bool = False, actor: str | None = None, reason: str | None = None
    ) -> str:
        """See `Accounts.close_account`."""
        return await self._run(self._accounts.close_account, user_id, forfeit=forfeit, actor=actor, reason=reason)

    async def reopen(
        self, user_id: str, plan: str, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """See `Accounts.reopen`."""
        return await self._run(self._accounts.reopen, user_id, plan, actor=actor, reason=reason)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._is_closed:
            raise ClientClosed
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))
