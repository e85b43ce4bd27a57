"""What the sponsorship pool promises, in plain Python: no code of the product but the errors it raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from worker.errors import BillingError, HoldClosed, HoldConflict

BUDGETS = {"new": 7, "established": 50, "trusted": 120, "elite": 400}


@dataclass
class Window:
    """A user's day. `open` until the next one; `absorbed` as Redis counts it."""

    number: int
    absorbed: int = 0
    open: bool = True


@dataclass
class Request:
    """What Redis remembers of a request."""

    user: str
    state: str
    mode: str = ""
    estimate: int = 0
    paid: int = 0
    held: int = 0
    tier: str = ""
    budget: int = 0
    window: Window | None = None
    answer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grant:
    """A stream entry of the pool: a settled request."""

    request: str
    user: str
    held: int
    actual: int
    paid: int
    absorbed: int
    window: Window
    tier: str
    budget: int
    late: bool


@dataclass(frozen=True)
class Credit:
    """A stream entry of the pool: a paid request."""

    request: str
    paid: int


@dataclass(frozen=True)
class TrustChanged:
    """A stream entry of the pool."""

    user: str


class Refusal(Exception):
    """The call raises this error, about a hold in this state."""

    def __init__(self, error: type[BillingError], state: str = "") -> None:
        super().__init__(error, state)
        self.error = error
        self.state = state


class Model:
    """The pool, in units. `shown` and `shown_tier` are what Redis has cached; None and missing are not cached."""

    def __init__(self, initial: int, users: Sequence[str]) -> None:
        self.initial = self.balance = initial
        self.seq = 0
        self.shown: int | None = None
        self.shown_tier: dict[str, str] = {}
        self.tiers = dict.fromkeys(users, "new")
        self.closed: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.settled: dict[str, int] = {}  # and not published
        self.windows: dict[str, Window] = {}
        self.only_in_ledger: set[str] = set()  # users of whose window Redis knows nothing
        self.numbers = count()
        self.stream: list[Grant | Credit | TrustChanged] = []
        self.granted: dict[str, Grant] = {}
        self.credited: dict[str, int] = {}
        self.applied = 0  # of the stream, committed and not published
        self.deaths = 0  # of workers, and nobody has cleared up after them
        self.refused = 0

    # -- What is known

    def held(self) -> dict[str, int]:
        """Open holds."""
        return {name: request.held for name, request in self.requests.items() if request.state == "held"}

    def taken(self, user: str) -> int:
        """Absorbed and held in the user's open window."""
        window = self.windows.get(user)
        if window is None or not window.open:
            return 0
        mine = (one for one in self.requests.values() if one.state == "held" and one.window is window)
        return window.absorbed + sum(one.held for one in mine)

    def find(self, user: str, host: str | None) -> tuple[str, int, int, int]:
        """Tier, budget, taken, left of the pool; caches what it reads."""
        own = self.shown_tier.setdefault(user, "new" if user in self.closed else self.tiers[user])
        if self.shown is None:
            self.shown = self.balance
        tier = own if host is None else host
        if tier not in BUDGETS:
            tier = "new"
        left = self.shown - sum(self.held().values()) - sum(self.settled.values())
        return tier, BUDGETS[tier], self.taken(user), max(0, left)

    def window_of(self, user: str) -> Window:
        """The open window, which Redis now knows; opens one where there is none."""
        self.only_in_ledger.discard(user)
        window = self.windows.get(user)
        if window is None or not window.open:
            window = self.windows[user] = Window(next(self.numbers))
        return window

    # -- Calls

    def ask(
        self, mode: str, user: str | None, estimate: int, name: str, paid: int = 0, host: str | None = None
    ) -> dict[str, Any]:
        """What `decide` ("all"), `confirm_partial` ("most") and `estimate` ("advise") answer."""
        wanted = estimate - paid
        answer: dict[str, Any] = {
            "user_id": user, "estimate": estimate, "serve": "gate", "absorb": 0, "charge": max(0, estimate),
            "tier": None, "daily_budget": 0, "absorbed_today": 0, "pool": 0,
        }  # fmt: skip
        if mode != "advise":
            answer |= {"request_id": name, "paid": paid, "outstanding": max(0, answer["charge"] - paid)}
            answer |= {"repeated": False, "holds": False}
        if user is None:
            return answer | {"reason": "no_identity"}
        if wanted <= 0:
            return answer | {"reason": "nothing_to_cover"}
        known = self.requests.get(name) if mode != "advise" else None
        if known and known.state != "held":
            raise Refusal(HoldClosed, known.state)
        if known and (known.user, known.mode, known.estimate, known.paid) != (user, mode, estimate, paid):
            raise Refusal(HoldConflict)
        if known:
            return known.answer | {"repeated": True}
        tier, budget, taken, left = self.find(user, host)
        room = max(0, budget - taken)
        absorb = min(wanted, room, left)
        answer |= {"tier": tier, "daily_budget": budget, "absorbed_today": taken, "pool": left, "absorb": absorb}
        answer |= {"charge": estimate - absorb, "serve": "gate" if not absorb else "partial"}
        if absorb == wanted:
            answer |= {"serve": "partial" if paid else "free", "reason": "within_budget"}
        elif absorb:
            answer["reason"] = "budget_short" if room <= left else "pool_short"
        elif budget == 0:
            answer["reason"] = "no_budget"
        else:
            answer["reason"] = "budget_spent" if room == 0 else "pool_empty"
        if mode == "advise":
            return answer
        answer["outstanding"] = max(0, answer["charge"] - paid)
        if absorb and (mode == "most" or absorb == wanted):
            answer["holds"] = True
            window = self.window_of(user)
            self.requests[name] = Request(
                user, "held", mode, estimate, paid, absorb, tier, budget, window, dict(answer)
            )
        return answer

    def settle(self, user: str, name: str, actual: int, paid: int | None, host: str | None = None) -> dict[str, Any]:
        """What `settle_sponsored` answers."""
        known = self.requests.get(name)
        if known is None or known.state == "released":
            raise Refusal(HoldClosed, "released" if known else "unknown")
        if known.user != user:
            raise Refusal(HoldConflict)
        if known.state == "settled":
            return known.answer | {"repeated": True}
        paid = known.paid if paid is None else paid
        absorbed = min(known.held, max(0, actual - paid))
        late = known.state == "expired"
        assert known.window is not None
        if late:
            known.tier, known.budget, taken, left = self.find(user, host)
            absorbed = min(absorbed, left, max(0, known.budget - taken))
            if absorbed:
                known.window = self.window_of(user)
        known.window.absorbed += absorbed
        known.state = "settled"
        known.answer = {
            "user_id": user, "request_id": name, "held": known.held, "actual": actual, "paid": paid,
            "absorbed": absorbed, "returned": known.held - absorbed, "uncovered": max(0, actual - paid - absorbed),
            "credited": paid // 10, "late": late, "repeated": False,
        }  # fmt: skip
        if absorbed:
            self.settled.setdefault(name, absorbed)
        entry = Grant(name, user, known.held, actual, paid, absorbed, known.window, known.tier, known.budget, late)
        self.stream.append(entry)
        return known.answer

    def release(self, user: str, name: str) -> dict[str, Any]:
        """What `release_sponsored` answers."""
        known = self.requests.get(name)
        if known and known.user != user:
            raise Refusal(HoldConflict)
        answer = {"user_id": user, "request_id": name, "state": "unknown", "amount": 0, "left": 0}
        if known:
            answer |= {"state": known.state, "amount": known.held}
        if known is None:
            self.requests[name] = Request(user, "released")
        elif known.state == "held":
            known.state = "released"
        return answer

    def credit(self, name: str, paid: int) -> dict[str, Any]:
        """What `credit_pool` answers."""
        self.stream.append(Credit(name, paid))
        return {"request_id": name, "paid": paid, "credited": paid // 10, "spooled": False}

    # -- Everything else that happens

    def commit(self) -> None:
        """A worker enters the stream in the books. What comes again changes nothing."""
        for entry in self.stream[self.applied :]:
            if isinstance(entry, Grant):
                known = self.granted.setdefault(entry.request, entry)
                if known is entry:
                    self._book(-entry.absorbed)
                elif (known.user, known.actual, known.paid) != (entry.user, entry.actual, entry.paid):
                    self.refused += 1
                    continue
            if isinstance(entry, Credit) or (isinstance(entry, Grant) and entry.paid):
                if entry.request not in self.credited:
                    self.credited[entry.request] = entry.paid
                    self._book(entry.paid // 10)
                elif self.credited[entry.request] != entry.paid:
                    self.refused += 1
        self.applied = len(self.stream)

    def _book(self, change: int) -> None:
        self.balance += change
        self.seq += 1

    def publish(self) -> None:
        """Redis is told."""
        for entry in self.stream:
            if isinstance(entry, Grant):
                self.settled.pop(entry.request, None)
            elif isinstance(entry, TrustChanged):
                self.shown_tier.pop(entry.user, None)
        if self.shown is not None:
            self.shown = self.balance
        if self.stream:
            self.deaths = 0
        self.stream = []
        self.applied = 0

    def close(self, user: str) -> None:
        """The account is closed; its history is kept under a name that nobody asks for."""
        self.closed.add(user)
        self.shown_tier.pop(user, None)
        if user in self.only_in_ledger:
            self.windows.pop(user)
            self.only_in_ledger.discard(user)

    def expire(self, name: str) -> None:
        """The hold's time is over."""
        self.requests[name].state = "expired"

    def let_a_day_pass(self) -> None:
        """All windows are over."""
        for window in self.windows.values():
            window.open = False
        self.shown_tier.clear()

    def forget(self) -> None:
        """Redis has lost everything: a budget is what the ledger says of the last window."""
        self.shown = None
        self.shown_tier.clear()
        self.requests.clear()
        self.settled.clear()
        self.windows.clear()
        self.only_in_ledger.clear()
        self.stream = []
        self.applied = self.deaths = 0
        for user in self.tiers.keys() - self.closed:
            mine = [grant for grant in self.granted.values() if grant.user == user]
            if mine:
                last = max((grant.window for grant in mine), key=lambda window: window.number)
                absorbed = sum(grant.absorbed for grant in mine if grant.window is last)
                # Others may have counted in it what is lost; the ledger says what it gave.
                last.absorbed = absorbed
                self.windows[user] = last
                self.only_in_ledger.add(user)
