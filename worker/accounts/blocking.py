"""`Accounts`: what payment webhooks, account pages and scripts of a host call. Needs Postgres and Redis.

Each method is the function behind a command. A caller's mistake raises AccountError, ReportError or CatalogueError. A
server that does not answer raises LedgerUnavailable or RedisUnavailable: repeat the call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Literal, Self

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
from worker.accounts import overviews
from worker.accounts.connections import Connections
from worker.admin import accounts, corrections, credits, limits, notices
from worker.admin.erasure import close_account, reopen
from worker.reports import usage
from worker.reports.credits import credits_of
from worker.reports.explain import explain
from worker.reports.finding import find
from worker.reports.limits import limits_of
from worker.rules.account import Account, ChangeAnswer


class Accounts:
    """Open, change and read accounts, blocking. Safe to share between threads, and with a child process after a fork.

        with Accounts.connect() as accounts:
            accounts.grant("user-42", "premium_voice", 5_000, key="order-9", actor="shop")

    Every change keeps `actor` and `reason`, each at most 256 printable characters: who made it and why. Repeating a
    call is harmless, and keeps the first actor and reason.
    """

    def __init__(self, settings: Settings) -> None:
        self._connections = Connections(settings)

    @classmethod
    def connect(cls, settings: Settings | None = None) -> Self:
        """Open from `settings`, or from the environment. Connects to no server before the first call.

        Raises SettingsError, CatalogueError, and LedgerUnavailable if DATABASE_URL is unset.
        """
        return cls(settings or load_settings(os.environ))

    def close(self) -> None:
        """Give the connections back. Calls after this raise ClientClosed."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(
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
        """Open an account on `plan`, with a first period for each of its meters.

        The period lasts from `period_start` (default: now) to `period_end` (default: the first renewal). `rollover` is
        in units by meter: saved allowance that the account brings along, or debt below zero. Calendar boundaries keep
        their time of day in `timezone`, an IANA name, else in the plan's. Repeating the same call is harmless.
        Raises AccountError if the account was opened otherwise or closed for good, CatalogueError for an unknown plan.
        """
        with self._connections.lend() as resources:
            return accounts.open_once(
                resources,
                user_id,
                plan,
                status=status,
                start=period_start,
                end=period_end,
                rollover=rollover,
                timezone=timezone,
                actor=actor,
                reason=reason,
            )

    def show(self, user_id: str) -> Account:
        """Return the account and its balances as they are now. Raises AccountError if there is none."""
        with self._connections.lend() as resources:
            return accounts.show(resources, user_id)

    def find(
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
        """Return the accounts that meet every condition given, by id, at most `limit`; without a condition, all.

        `prefix` is the beginning of an id, `log_name` a user as logs name it (`user:` and 12 digits, or the digits
        alone). Plan and status are those stored. `after` is the `more_after` of the page before.
        Raises ReportError for a condition that no account can meet.
        """
        with self._connections.lend() as resources:
            return find(
                resources,
                user_id=user_id,
                prefix=prefix,
                log_name=log_name,
                plan=plan,
                status=status,
                after=after,
                limit=limit,
            )

    def usage(self, user_id: str) -> UsageSummary:
        """Report plan, status and every meter of an account, as a check would find them. Raises ReportError."""
        with self._connections.lend() as resources:
            return usage.usage_summary(resources, user_id)

    def breakdown(self, user_id: str, *, documents: int = 200, after: str | None = None) -> Breakdown:
        """Report the open periods of an account, per voice and model, and per document.

        Lists at most `documents` documents. `after` is the `more_documents_after` of the page before.
        Raises ReportError.
        """
        with self._connections.lend() as resources:
            return usage.breakdown(resources, user_id, documents=documents, after=after)

    def engagement(self, user_id: str) -> Engagement:
        """Report the whole life of an account, per voice and month, and its documents. Raises ReportError."""
        with self._connections.lend() as resources:
            return usage.engagement(resources, user_id)

    def timeline(self, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> Timeline:
        """Report changes of an account, newest first, at most `limit`; who made each and why.

        `before_seq` is the `more_before_seq` of the page before. Raises ReportError.
        """
        with self._connections.lend() as resources:
            return usage.timeline(resources, user_id, limit=limit, before_seq=before_seq)

    def events(self, user_id: str, *, limit: int = 50, before_seq: int | None = None) -> EventPage:
        """Report recorded events of an account, newest first, at most `limit`.

        `before_seq` is the `more_before_seq` of the page before. Raises ReportError.
        """
        with self._connections.lend() as resources:
            return usage.events(resources, user_id, limit=limit, before_seq=before_seq)

    def explain(self, user_id: str, event_id: str) -> Explanation:
        """Explain which bucket paid how much for an event, and why.

        Raises ReportError for an event that is neither applied nor refused.
        """
        with self._connections.lend() as resources:
            return explain(resources, user_id, event_id)

    def report_usage(
        self,
        since: date | None = None,
        until: date | None = None,
        *,
        by: Sequence[str] = ("meter",),
        meter: str | None = None,
        plan: str | None = None,
        limit: int = 1_000,
    ) -> UsageReport:
        """Report usage of all accounts on the days from `since` up to, and without, `until`: events and amount.

        Days are UTC days of the work; by default this month. `by` names groups: day, meter, plan, account; the meter
        is always one. The answer has the first `limit` rows, and `more` if there are others: the command prints all.
        Raises ReportError.
        """
        with self._connections.lend() as resources:
            return overviews.usage_report(resources, since, until, by=by, meter=meter, plan=plan, limit=limit)

    def report_top(
        self, since: date | None = None, until: date | None = None, *, meter: str | None = None, limit: int = 10
    ) -> TopReport:
        """Report the `limit` accounts that used most of each meter in a span of days. Raises ReportError."""
        with self._connections.lend() as resources:
            return overviews.top_report(resources, since, until, meter=meter, limit=limit)

    def report_near_limit(
        self, percent: int | None = None, *, meter: str | None = None, limit: int = 1_000
    ) -> NearLimitReport:
        """Report the accounts that have used `percent` of a limit, as a check would find them now.

        None is METERFALL_NEAR_LIMIT_PERCENT. `limit` and `more`: see `report_usage`. Raises ReportError.
        """
        with self._connections.lend() as resources:
            return overviews.near_limit_report(resources, percent, meter=meter, limit=limit)

    def report_debtors(self, *, meter: str | None = None, limit: int = 1_000) -> DebtorsReport:
        """Report the accounts that owe units, as a check would find them now. Raises ReportError."""
        with self._connections.lend() as resources:
            return overviews.debtors_report(resources, meter=meter, limit=limit)

    def report_purchased(
        self, by: Literal["meter", "account"] = "meter", *, meter: str | None = None, limit: int = 1_000
    ) -> PurchasedReport:
        """Report purchased units that are not spent, by meter or by account. Raises ReportError."""
        with self._connections.lend() as resources:
            return overviews.purchased_report(resources, by, meter=meter, limit=limit)

    def report_uncollected(
        self, since: date | None = None, until: date | None = None, *, meter: str | None = None, limit: int = 1_000
    ) -> UncollectedReport:
        """Report events that no account paid, by user and meter; without days, all of them. Raises ReportError."""
        with self._connections.lend() as resources:
            return overviews.uncollected_report(resources, since, until, meter=meter, limit=limit)

    def grant(
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
        """Grant `amount` purchased units, from `effective_at` (default: now) until `expires_at` (default: for ever).

        Grants pay in this order: `priority` (0 first, 100 last), the soonest end, `promotional` before `paid`
        (`category`), the earliest start. An event is charged by the grants in force when Redis accepted it.
        `key` (the paid order or invoice) makes repeats harmless, and is used once in all accounts. A missing account is
        opened on `open_plan`, if that is given. Debt counts against the credits: `owes` of the answer is the debt on
        this meter, `missing` the units that the account lacks before anything is available.
        Raises AccountError, also for a key of another grant; OrderUsed for a key of another account.
        """
        with self._connections.lend() as resources:
            return credits.grant(
                resources,
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

    def credits(self, user_id: str) -> Credits:
        """Report every grant of an account: what it gave, what is left, when it ends, and what used it.

        Raises ReportError.
        """
        with self._connections.lend() as resources:
            return credits_of(resources, user_id)

    def claw_back(
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
        """Take purchased units back, as after a refund: `amount` of them, or up to the `total_refunded` of an order.

        `order` is the key of the grant. A refund takes at most the units that its order gave and that were not taken
        back yet; without an order, at most the units ever bought and not taken back. A smaller total than before takes
        nothing and is `stale`. It takes from the grant of its order first. Units that are spent already become debt;
        `debt` of the answer says how many, `taken` how many in all; expired ones are `gone`. `key` makes repeats
        harmless; a total needs none.
        Raises AccountError, also for more units than may be taken and for a key of another refund.
        """
        with self._connections.lend() as resources:
            return credits.claw_back(
                resources,
                user_id,
                meter,
                amount,
                key,
                order=order,
                total_refunded=total_refunded,
                actor=actor,
                reason=reason,
            )

    def adjust(
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
        """Add these units, which may be below zero, to the buckets of a meter; `used` counts in the open period.

        Only this, `forgive_debt` and `undo` put a balance right. `key` makes repeats harmless.
        Raises AccountError, also if used or purchased would fall below zero and for a key of another adjustment.
        """
        with self._connections.lend() as resources:
            return corrections.adjust(
                resources,
                user_id,
                meter,
                rollover=rollover,
                purchased=purchased,
                used=used,
                key=key,
                actor=actor,
                reason=reason,
            )

    def forgive_debt(
        self,
        user_id: str,
        meter: str,
        amount: int | None = None,
        *,
        key: str,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Forgive `amount` units of debt on a meter, by default all of it; `forgiven` of the answer says how many.

        `key` makes repeats harmless. Raises AccountError, also for more than the account owes.
        """
        with self._connections.lend() as resources:
            return corrections.forgive_debt(resources, user_id, meter, amount, key=key, actor=actor, reason=reason)

    def undo(
        self,
        user_id: str,
        entry: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Undo a grant, a claw-back or an adjustment by its entry key, such as `grant:order-9`, once.

        Of a grant it takes the units that no refund took back; spent ones become debt, `debt` of the answer.
        Repeating is harmless. Raises AccountError, also for an entry of another kind.
        """
        with self._connections.lend() as resources:
            return corrections.undo(resources, user_id, entry, actor=actor, reason=reason)

    def reverse(
        self, user_id: str, event_id: str, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """Put the units of an event back into their buckets, once. Repeating is harmless.

        Raises AccountError for an unknown event, and for one that no bucket paid.
        """
        with self._connections.lend() as resources:
            return credits.reverse(resources, user_id, event_id, actor=actor, reason=reason)

    def renew(
        self,
        user_id: str,
        invoice_id: str,
        period_start: datetime,
        period_end: datetime,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Say that a cycle invoice paid the time from `period_start` to `period_end`.

        It adopts an open period that nobody paid, if that is at most `renewal_grace_hours` older than it; what was used
        stays used. It follows a paid period that is over: unused allowance pays debt first, then rolls over up to the
        cap. Otherwise it closes the open period, whose rest is lost. One that begins more than an hour ahead waits
        (`waits_until`), one that comes too late is `stale` and changes nothing. A plan change that waits for the
        provider's next period takes effect with it. `invoice_id` makes repeats harmless.
        Raises AccountError, also for a plan without such meters; KeyConflict for an invoice of other dates, or of
        another account.
        """
        with self._connections.lend() as resources:
            return accounts.renew(resources, user_id, invoice_id, period_start, period_end, actor=actor, reason=reason)

    def change_plan(
        self,
        user_id: str,
        plan: str,
        *,
        at: Literal["now", "period_end"] | datetime = "now",
        period_end: datetime | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Put the account on `plan` now, at the end of the period, or at a date.

        Now: the open period takes the new allowance; its bounds, used and rollover stay. Naming the current plan
        withdraws a scheduled change. `period_end` is the provider's end of the first period, if the provider renews
        the new plan. Repeating is harmless.
        Raises AccountError, CatalogueError.
        """
        with self._connections.lend() as resources:
            return accounts.change_plan(
                resources, user_id, plan, at=at, period_end=period_end, actor=actor, reason=reason
            )

    def set_status(
        self,
        user_id: str,
        status: str,
        *,
        at: Literal["now", "period_end"] | datetime = "now",
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Set the account's status now, or end it at the end of its period or at a date.

        Only trialing, active and past_due accounts have an allowance. `active` withdraws a scheduled cancellation and
        turns a trial into an account. Repeating is harmless.
        Raises AccountError.
        """
        with self._connections.lend() as resources:
            return accounts.set_status(resources, user_id, status, at=at, actor=actor, reason=reason)

    def set_period(
        self,
        user_id: str,
        period_end: datetime,
        key: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Correct the end of the open period that the payment provider renews, or of a trial.

        Also where the period had no end yet; an end that is over closes the period at once. While older events wait in
        the account's stream, the correction takes effect after them. `key` makes repeats harmless.
        Raises AccountError, also for an end before the period's start; KeyConflict for a key that set another end.
        """
        with self._connections.lend() as resources:
            return accounts.set_period(resources, user_id, period_end, key, actor=actor, reason=reason)

    def set_timezone(
        self, user_id: str, timezone: str | None, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """Give the account a time zone (an IANA name) for its calendar boundaries; None: the plan's.

        Open periods keep their end. Repeating is harmless. Raises AccountError.
        """
        with self._connections.lend() as resources:
            return accounts.set_timezone(resources, user_id, timezone, actor=actor, reason=reason)

    def set_limit(
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
        """Limit what an account may spend of a meter `per` "day", "week" or "month"; None takes the limit away.

        Windows are those of the calendar in the account's time zone. It is the limit `of` an "operator" or of the
        "user"; those of others and of the plan stay, and checks, holds and charges enforce all. What the open window
        has used already counts. Events are recorded all the same.
        `key` makes repeats harmless; without one, a call for the amount in force changes nothing. Raises AccountError.
        """
        with self._connections.lend() as resources:
            return limits.set_limit(resources, user_id, meter, per, amount, key=key, of=of, actor=actor, reason=reason)

    def limits(self, user_id: str) -> AccountLimits:
        """Report every limit of an account: amount, used and left in the open window, and when that ends.

        Raises ReportError.
        """
        with self._connections.lend() as resources:
            return limits_of(resources, user_id)

    def set_pay_from(
        self, user_id: str, pay_from: str | None, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """Let checks, holds and charges count the "allowance" and rollover alone; None: purchased units also.

        What is recorded takes from purchased units all the same. Repeating is harmless. Raises AccountError.
        """
        with self._connections.lend() as resources:
            return limits.set_pay_from(resources, user_id, pay_from, actor=actor, reason=reason)

    def set_notices(
        self,
        user_id: str,
        rules: Sequence[Mapping[str, object]] | None,
        *,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Set what the account is told, as `notices` of a plan in the catalogue; None: what its plan says.

        An empty list: nothing. Repeating is harmless. Raises AccountError.
        """
        with self._connections.lend() as resources:
            return notices.set_rules(resources, user_id, rules, actor=actor, reason=reason)

    def notices(
        self,
        *,
        after: int = 0,
        limit: int = 100,
        kinds: Sequence[str] | None = None,
        user_id: str | None = None,
    ) -> NoticeFeed:
        """Return the notices after the cursor `after`, in the order in which they were told, at most `limit` (1,000).

        `cursor` of the answer is where the next page begins. Only these `kinds`, and those about `user_id`, if given.
        Reading changes nothing: a reader that died begins at its last cursor again. Raises AccountError.
        """
        with self._connections.lend() as resources:
            return notices.feed(resources, after=after, limit=limit, kinds=kinds, user_id=user_id)

    def set_trust(
        self, user_id: str, trust: str, *, actor: str | None = None, reason: str | None = None
    ) -> ChangeAnswer:
        """Put the account into a trust tier of the sponsorship pool. Repeating is harmless. Raises AccountError."""
        with self._connections.lend() as resources:
            return accounts.set_trust(resources, user_id, trust, actor=actor, reason=reason)

    def seed(
        self,
        user_id: str,
        amount: int | None = None,
        *,
        meter: str = "credits",
        plan: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> ChangeAnswer:
        """Open an account at sign-up; its first period of `meter` grants `amount` units, by default the plan's.

        An existing account is not seeded again: the answer is `repeated`. Raises AccountError, CatalogueError.
        """
        with self._connections.lend() as resources:
            return credits.seed_signup(resources, user_id, amount, meter=meter, plan=plan, actor=actor, reason=reason)

    def carry_over(
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
        """Move the free purchased units of `meter` to another account, as from a trial; return the receiving account.

        Units that open holds may still cost stay: `kept` of the answer, `moved` are the others. Orders go along, and
        the giver's debt if `with_debt` says so. `key` makes repeats harmless.
        Raises AccountError, also for a giver in debt and while events of the giver wait to be applied.
        """
        with self._connections.lend() as resources:
            return credits.carry_over(
                resources, from_user, to_user, key, meter=meter, with_debt=with_debt, actor=actor, reason=reason
            )

    def close_account(
        self, user_id: str, *, forfeit: bool = False, actor: str | None = None, reason: str | None = None
    ) -> str:
        """Close an account and erase the person; return the name under which its history is kept.

        This cannot be undone. Repeating is harmless. Raises AccountError, also for purchased units, rollover, open
        holds and unread events that would be lost, unless `forfeit` says to lose them.
        """
        with self._connections.lend() as resources:
            return close_account(resources, user_id, forfeit=forfeit, actor=actor, reason=reason)

    def reopen(self, user_id: str, plan: str, *, actor: str | None = None, reason: str | None = None) -> ChangeAnswer:
        """Let the id of a closed account begin anew on `plan`. Late repeats of its old events stay known.

        Repeating is harmless. Raises AccountError, CatalogueError.
        """
        with self._connections.lend() as resources:
            return reopen(resources, user_id, plan, actor=actor, reason=reason)


class SharingAccounts(Accounts):
    """`Accounts` on connections that others use as well; `close` gives them back for all."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
