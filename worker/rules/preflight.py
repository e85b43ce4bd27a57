"""The facts behind a check, and its answer. Pure: a script's reply or an account in, an answer out.

The gate of the scripts (worker/keyspace/lua/common.lua) decides in Redis; the ledger decides while Redis is down. Both
give one `MeterStanding`, and the answers derive from that alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from schemas.answers import BackendRemaining, CheckAnswer, Parts, Reason, Remaining
from worker.errors import HoldConflict, UsageDenied, UsageLimitExceeded
from worker.rules.account import Account, Balance
from worker.rules.fractions import MILLIONTHS
from worker.rules.wallets import Pending, meters_of, price_in_millionths, wallet_of
from worker.rules.waterfall import Buckets, available, may_spend, pay

if TYPE_CHECKING:
    from worker.ledger.holds import LedgerHold


class Spend(NamedTuple):
    """A spend that a check, a hold or a charge is about: `amount` units of `meter`, on `backend` if that is known."""

    user_id: str
    meter: str
    amount: int
    backend: str | None = None


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

    A suspended account may spend nothing, so its buckets are empty here. If the meter has a `wallet`, buckets and
    pending are those of the wallet, in its units.
    """

    buckets: Buckets
    pending: int
    kind: str | None
    caps: Mapping[str, Cap]
    in_plan: bool
    is_suspended: bool = False
    wallet: InWallet | None = None

    def cost(self, amount: int) -> int:
        """Return the units of the buckets that `amount` units of the meter cost."""
        return amount if self.wallet is None else self.wallet.own.cost_of_more(amount)


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
    wallet = in_wallet_of(reply[-1])
    return MeterStanding(
        buckets_in(reply), int(reply[6]), kind, caps, status != b"absent", status == b"suspended", wallet
    )


def in_wallet_of(facts: object) -> InWallet | None:
    """Return the part of a meter in its wallet, by the last value of a reply; None for any other value."""
    if not isinstance(facts, list):
        return None
    name, whole, part, carried, pending, limit, used = facts
    own = Pending(int(pending), int(whole) * MILLIONTHS + int(part), int(carried))
    return InWallet(name.decode(), own, None if limit == b"-" else Cap(int(limit), int(used), own.cost))


def check_answer(spend: Spend, standing: MeterStanding | None) -> CheckAnswer:
    """Answer whether the user may spend the amount.

    The meter decides first, then the sub-cap of the backend. No standing: an unknown account.
    """
    if standing is None:
        return answer_without_balance(spend, Reason.UNKNOWN_ACCOUNT, 0)
    if standing.is_suspended:
        return answer_without_balance(spend, Reason.SUSPENDED, 0)
    buckets, pending, kind, caps, in_plan, _, wallet = standing
    left, cost = available(buckets, pending), standing.cost(spend.amount)
    cap = caps.get(spend.backend or "")
    if wallet is not None:
        cap = wallet.cap
    if left is not None and cost > left:
        reason = Reason.LIMIT_EXCEEDED if in_plan else Reason.METER_NOT_IN_PLAN
        if kind == RENEWAL_MISSING:
            reason = Reason.RENEWAL_MISSING
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


def expected_parts(buckets: Buckets, pending: int, amount: int) -> Parts:
    """Return the parts expected to pay `amount`, after pending usage is paid."""
    return Parts(**pay(pay(buckets, pending)[0], amount)[1]._asdict())


def remaining_answer(user_id: str, meter: str, standing: MeterStanding | None) -> Remaining:
    """Answer the units left. No standing: there is no account, so nothing is left."""
    if standing is None:
        return Remaining(user_id=user_id, meter=meter, kind=None, limit=0, used=0, pending=0, remaining=0)
    buckets, pending, kind, caps, _, _, wallet = standing
    left = available(buckets, pending)
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
    user_id, meter, amount, backend = spend
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
    buckets = balance.buckets(account.status)
    cap_used = balance.cap_used or {}
    caps = {
        backend: Cap(cap, cap_used.get(backend, 0), sum(hold.amount for hold in held if hold.backend == backend))
        for backend, cap in (balance.caps or {}).items()
        if cap is not None
    }
    return MeterStanding(buckets, pending, kind_of_limit(balance, buckets.limit), caps, in_plan=True)


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
    buckets = balance.buckets(account.status)
    limit = (balance.caps or {}).get(meter)
    cap = None if limit is None else Cap(limit, (balance.cap_used or {}).get(meter, 0), own.cost)
    return MeterStanding(
        buckets, sum(each.cost for each in pending.values()), kind_of_limit(balance, buckets.limit), {}, in_plan=True,
        wallet=InWallet(wallet, own, cap),
    )  # fmt: skip


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
    Reason.RENEWAL_MISSING,
)  # fmt: skip
