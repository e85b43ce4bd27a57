"""The facts behind a check, and its answer. Pure: a script's reply or an account in, an answer out.

The gate of the scripts (worker/keyspace/lua/common.lua) decides in Redis; the ledger decides while Redis is down. Both
give one `MeterStanding`, and the answers derive from that alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from schemas.answers import BackendRemaining, CheckAnswer, LimitReached, Parts, PayFrom, Reason, Remaining
from worker.errors import HoldConflict, UsageDenied, UsageLimitExceeded
from worker.rules.account import Account, Balance
from worker.rules.fractions import MILLIONTHS
from worker.rules.limits import LimitStanding, denying
from worker.rules.wallets import Pending, meters_of, price_in_millionths, wallet_of
from worker.rules.waterfall import Buckets, available, may_spend, pay

if TYPE_CHECKING:
    from worker.ledger.holds import LedgerHold


class Spend(NamedTuple):
    """A spend that a check, a hold or a charge is about: `amount` units of `meter`, on `backend` if that is known.

    With `pay_from` "allowance" purchased units do not count for it; else the account says whether they do.
    """

    user_id: str
    meter: str
    amount: int
    backend: str | None = None
    pay_from: PayFrom | None = None


class Cap(NamedTuple):
    """The sub-cap of a backend, in units."""

    limit: int
    used: int
    pending: int

    @property
    def left(self) -> int:
        """Return the units left to spend on this backend."""
        return max(0, self.limit - self.used - self.pending)


class InWallet(NamedTuple):
    """The part of a meter in the wallet that it draws on: what is pending on it, and its cap there if it has one."""

    name: str
    own: Pending
    cap: Cap | None


class MeterStanding(NamedTuple):
    """The standing of an account on one meter, by a script or the ledger. `caps`: sub-caps in force by backend.

    `limits` are those per day, week and month. With `pay_from` "allowance" the account's purchased units do not count.
    A suspended account may spend nothing, so its buckets are empty here. If the meter has a `wallet`, buckets, limits
    and pending are those of the wallet, in its units.
    """

    buckets: Buckets
    pending: int
    kind: str | None
    caps: Mapping[str, Cap]
    in_plan: bool
    is_suspended: bool = False
    limits: tuple[LimitStanding, ...] = ()
    pay_from: PayFrom | None = None

    wallet: InWallet | None = None

    def cost(self, amount: int) -> int:
        """Return the units of the buckets that `amount` units of the meter cost."""
        return amount if self.wallet is None else self.wallet.own.cost_of_more(amount)

    def available(self, pay_from: PayFrom | None = None) -> int | None:
        """Return the units left to spend by the buckets and all limits; None = unlimited.

        `pay_from` is what the call says of it.
        """
        buckets = self.buckets
        if "allowance" in (pay_from, self.pay_from):
            buckets = buckets._replace(purchased=0)
        left = available(buckets, self.pending)
        for limit in self.limits:
            room = limit.left(self.pending)
            left = room if left is None else min(left, room)
        return left


# Between the parts of a limit in the text of a cached balance, and between limits.
_PART, _EACH = ":", ","
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def bounds_text(limits: Sequence[LimitStanding], pay_from: str | None) -> str:
    """Return what else bounds checks of a meter, as the text of a cached balance has it; `bounds_in` reads it.

    It is `allowance` if purchased units do not count, and each limit as window:setter:amount:used:end (ms).
    """
    told = ["allowance"] if pay_from == "allowance" else []
    for limit in limits:
        ends_ms = (limit.ends_at - _EPOCH) // _MILLISECOND
        told.append(_PART.join(map(str, (limit.per, limit.set_by, limit.amount, limit.used, ends_ms))))
    return _EACH.join(told)


def bounds_in(text: str) -> tuple[tuple[LimitStanding, ...], PayFrom | None]:
    """Return the limits in the bounds of a cached balance, and what the account pays from."""
    limits = []
    pay_from: PayFrom | None = None
    for each in text.split(_EACH):
        if each == "allowance":
            pay_from = "allowance"
            continue
        per, set_by, amount, used, ends_ms = cast("Any", each.split(_PART))
        ends_at = _EPOCH + int(ends_ms) * _MILLISECOND
        limits.append(LimitStanding(per, set_by, int(amount), int(used), None, ends_at))
    return tuple(limits), pay_from


def buckets_in(reply: Sequence[bytes]) -> Buckets:
    """Return the buckets in a reply of the gate, or of a charge."""
    limit = None if reply[1] == b"-" else int(reply[1])
    return Buckets(limit, int(reply[2]), int(reply[3]), int(reply[4]), reply[5] == b"1")


def standing_in_reply(reply: Sequence[bytes], backends: Sequence[str]) -> MeterStanding | None:
    """Return the standing in a reply of the scripts' gate about these backends.

    None: there is no such account.
    """
    if reply[0] == b"unknown":
        return None
    caps = {}
    for at, backend in enumerate(backends):
        cap, used, pending = reply[8 + 3 * at : 11 + 3 * at]
        if cap != b"-":
            caps[backend] = Cap(int(cap), int(used), int(pending))
    status = reply[0]
    kind = reply[7].decode() or None
    standing = MeterStanding(buckets_in(reply), int(reply[6]), kind, caps, status != b"absent", status == b"suspended")
    wallet = in_wallet_of(reply[-1])
    if wallet is not None:
        standing = standing._replace(wallet=wallet)
    bounds = reply[8 + 3 * len(backends) : len(reply) - (wallet is not None)]
    if not bounds:
        return standing
    limits, pay_from = bounds_in(bounds[0].decode())
    return standing._replace(limits=limits, pay_from=pay_from)


def in_wallet_of(facts: object) -> InWallet | None:
    """Return the part of a meter in its wallet, by the last value of a reply; None for any other value."""
    if not isinstance(facts, list):
        return None
    name, whole, part, carried, pending, limit, used = facts
    own = Pending(int(pending), int(whole) * MILLIONTHS + int(part), int(carried))
    return InWallet(name.decode(), own, None if limit == b"-" else Cap(int(limit), int(used), own.cost))


def check_answer(spend: Spend, standing: MeterStanding | None) -> CheckAnswer:
    """Answer whether the user may spend the amount.

    The meter decides first, then its limits, then the sub-cap of the backend. No standing: an unknown account.
    """
    if standing is None:
        return answer_without_balance(spend, Reason.UNKNOWN_ACCOUNT, 0)
    if standing.is_suspended:
        return answer_without_balance(spend, Reason.SUSPENDED, 0)
    buckets, pending, kind, caps, in_plan = standing[:5]
    wallet, cost = standing.wallet, standing.cost(spend.amount)
    left = standing.available(spend.pay_from)
    in_buckets = standing._replace(limits=()).available(spend.pay_from)
    cap = caps.get(spend.backend or "") if wallet is None else wallet.cap
    limit = denying(standing.limits, cost, pending) if standing.limits else None
    if in_buckets is not None and cost > in_buckets:
        reason = Reason.LIMIT_EXCEEDED if in_plan else Reason.METER_NOT_IN_PLAN
        if kind == RENEWAL_MISSING:
            reason = Reason.RENEWAL_MISSING
    elif limit is not None:
        reason = Reason.SPENDING_LIMIT_REACHED
    elif cap is not None and cost > cap.left:
        reason = Reason.BACKEND_CAP_EXCEEDED if wallet is None else Reason.METER_CAP_EXCEEDED
    else:
        reason = Reason.UNLIMITED if left is None and cap is None else Reason.WITHIN_LIMIT
    answer = CheckAnswer(
        user_id=spend.user_id,
        meter=spend.meter,
        requested=spend.amount,
        allowed=reason is Reason.WITHIN_LIMIT or reason is Reason.UNLIMITED,
        reason=reason,
        available=left,
        pending=pending,
        limit=buckets.limit,
        used=buckets.used,
        rollover=buckets.rollover,
        purchased=buckets.purchased,
        kind=kind,
        backend=spend.backend,
        pay_from=spend.pay_from or standing.pay_from,
        limited_by=limit_reached(limit) if reason is Reason.SPENDING_LIMIT_REACHED and limit is not None else None,
    )
    if cap is None and wallet is None:
        return answer
    room = left
    figures: dict[str, object] = {}
    if cap is not None:
        room = cap.left if left is None else min(left, cap.left)
        figures = {"cap": cap.limit, "cap_used": cap.used, "cap_pending": cap.pending}
    if wallet is not None:
        room = room if room is None else wallet.own.units_for(room)
        if wallet.name != spend.meter:
            figures |= {"wallet": wallet.name, "price": wallet.own.price, "cost": cost}
    return answer.model_copy(update={**figures, "available": room})


def limit_reached(limit: LimitStanding) -> LimitReached:
    """Return a limit as an answer names it."""
    return LimitReached(
        per=limit.per, set_by=limit.set_by, amount=limit.amount, used=max(0, limit.used), ends_at=limit.ends_at
    )


def expected_parts(buckets: Buckets, pending: int, amount: int) -> Parts:
    """Return the parts expected to pay `amount`, after pending usage is paid."""
    return Parts(**pay(pay(buckets, pending)[0], amount)[1]._asdict())


def remaining_answer(user_id: str, meter: str, standing: MeterStanding | None) -> Remaining:
    """Answer the units left. No standing: there is no account, so nothing is left."""
    if standing is None:
        return Remaining(user_id=user_id, meter=meter, kind=None, limit=0, used=0, pending=0, remaining=0)
    buckets, pending, kind, caps = standing[:4]
    wallet, left = standing.wallet, standing.available()
    if wallet is not None and wallet.cap is not None:
        left = wallet.cap.left if left is None else min(left, wallet.cap.left)
    backends = tuple(
        BackendRemaining(backend=backend, cap=cap.limit, used=cap.used, pending=cap.pending, remaining=cap.left)
        for backend, cap in sorted(caps.items())
    )
    return Remaining(
        user_id=user_id,
        meter=meter,
        kind=kind,
        limit=buckets.limit,
        used=buckets.used,
        pending=pending,
        remaining=left if left is None or wallet is None else wallet.own.units_for(left),
        backends=backends,
        wallet=wallet.name if wallet and wallet.name != meter else None,
        price=wallet.own.price if wallet and wallet.name != meter else None,
    )


def answer_without_balance(
    spend: Spend, reason: Reason, left: int | None = None, *, allowed: bool = False
) -> CheckAnswer:
    """Return an answer that no balance decided."""
    return CheckAnswer(
        user_id=spend.user_id,
        meter=spend.meter,
        requested=spend.amount,
        allowed=allowed,
        reason=reason,
        available=left,
        backend=spend.backend,
    )


def ledger_check(account: Account | None, spend: Spend, holds: Sequence[LedgerHold]) -> CheckAnswer:
    """Answer from the ledger alone, beside the holds that it granted."""
    return check_answer(spend, standing_in_ledger(account, spend.meter, holds))


def ledger_hold(
    account: Account | None, spend: Spend, key: str, holds: Sequence[LedgerHold], max_holds: int
) -> LedgerHold | None:
    """Return the hold that the ledger granted under `key` before; None if it may grant this one.

    `holds` are those of the account that have not expired, at most `max_holds`. Raises HoldConflict if the key has
    another hold, UsageDenied if the balance or their number leaves no room.
    """
    user_id, meter, amount, backend = spend[:4]
    for held in holds:
        if held.key == key and (held.meter, held.amount, held.backend) != (meter, amount, backend):
            raise HoldConflict(user_id, key, held.meter, held.amount, held.backend)
        if held.key == key:
            return held
    answer = ledger_check(account, spend, holds)
    if not answer.allowed:
        raise denied(answer)
    # An account that its first event will open has no row to lock yet.
    unopened = account is None or account.version == 0
    if unopened or len(holds) >= max_holds:
        reason = Reason.REDIS_DOWN_DENIED if unopened else Reason.REDIS_DOWN_BOUND_REACHED
        raise UsageDenied(answer.model_copy(update={"allowed": False, "reason": reason}))
    return None


def standing_in_ledger(account: Account | None, meter: str, holds: Sequence[LedgerHold]) -> MeterStanding | None:
    """Return the standing of an account by the ledger. None: there is no such account."""
    if account is None:
        return None
    held = [hold for hold in holds if hold.meter == meter]
    pending = sum(hold.amount for hold in held)
    wallet = wallet_of(account.draws, meter) if account.draws and may_spend(account.status) else None
    if wallet is not None:
        by_meter = Counter[str]()
        for hold in holds:
            by_meter[hold.meter] += hold.amount
        return standing_in_wallet(account, meter, wallet, by_meter)
    if not may_spend(account.status):
        return MeterStanding(Buckets(0, 0, 0, 0, spill=True), pending, None, {}, in_plan=True, is_suspended=True)
    balance = account.balances.get(meter)
    if balance is None:
        return MeterStanding(Buckets(0, 0, 0, 0, spill=True), pending, None, {}, in_plan=False)
    cap_used = balance.cap_used or {}
    caps = {
        backend: Cap(cap, cap_used.get(backend, 0), sum(hold.amount for hold in held if hold.backend == backend))
        for backend, cap in (balance.caps or {}).items()
        if cap is not None
    }
    return standing_of(account, balance, pending)._replace(caps=caps)


def standing_of(account: Account, balance: Balance, pending: int) -> MeterStanding:
    """Return the standing of an account on the meter of a balance, beside `pending` units; without sub-caps."""
    buckets = balance.buckets(account.status)
    limits = () if balance.limits is None else tuple(balance.limits.standings())
    kind = kind_of_limit(balance, buckets.limit)
    pay_from: Any = account.pay_from
    return MeterStanding(buckets, pending, kind, {}, in_plan=True, limits=limits, pay_from=pay_from)


def standing_in_wallet(account: Account, meter: str, wallet: str, units: Mapping[str, int]) -> MeterStanding:
    """Return the standing of a meter that draws on a wallet, or of the wallet itself, with pending `units` by meter."""
    pending = {
        name: Pending(
            units.get(name, 0),
            price_in_millionths(price),
            0 if name == wallet else account.balances[name].carried,
        )
        for name, price in meters_of(account.draws, wallet).items()
    }
    balance, own = account.balances[wallet], pending[meter]
    limit = (balance.caps or {}).get(meter)
    cap = None if limit is None else Cap(limit, (balance.cap_used or {}).get(meter, 0), own.cost)
    standing = standing_of(account, balance, sum(each.cost for each in pending.values()))
    return standing._replace(wallet=InWallet(wallet, own, cap))


# The kind of a limit that is 0 because no invoice paid the open period.
RENEWAL_MISSING = "renewal_missing"


def kind_of_limit(balance: Balance, limit: int | None) -> str:
    """Return what kind of limit is in force on a meter: its cadence, `unlimited`, or why it is 0."""
    if balance.backing == "missing":
        return RENEWAL_MISSING
    return "unlimited" if limit is None else balance.cadence


def denied(answer: CheckAnswer) -> UsageDenied:
    """Return the error for a check that said no."""
    return UsageLimitExceeded(answer) if answer.reason in _EXCEEDED else UsageDenied(answer)


_EXCEEDED = (
    Reason.LIMIT_EXCEEDED, Reason.METER_NOT_IN_PLAN, Reason.BACKEND_CAP_EXCEEDED, Reason.METER_CAP_EXCEEDED,
    Reason.RENEWAL_MISSING, Reason.SPENDING_LIMIT_REACHED,
)  # fmt: skip
