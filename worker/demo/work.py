"""The load of the demo: the work of its producers, from a seed. Pure: no clock, no I/O, the same for the same seed.

A few users do most of the work (Zipf's law), and work comes in bursts of one user, as a book read aloud page by page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Literal, NamedTuple, TypeVar

from schemas.events import Refusal

Ending = Literal["settle", "release", "abandon"]
Choice = TypeVar("Choice")

# Smallest and largest amount of one piece of work, in units of the meter.
_AMOUNTS = {
    "server_kokoro": (200, 4_000),
    "premium_voice": (50, 1_000),
    "ocr_tokens": (200, 8_000),
    "credits": (1, 6),
    "relay_credits": (1, 6),
}
_OTHER_AMOUNTS = (1, 10)
_SKEW = 1.1
_BURST_CHANCE = 0.04
_BURST_LENGTHS = (10, 50)
_PAGED_CHANCE = 0.15
_REPEATED_CHANCE = 0.01
_MODELS = (None, None, "m1", "m2", "m2-turbo", "m3")
# Kinds of work, per thousand pieces.
_KINDS = {"held": 560, "emitted": 290, "charged": 147, "malformed": 3}
_ENDINGS: dict[Ending, int] = {"settle": 900, "release": 98, "abandon": 2}


class Customer(NamedTuple):
    """A user on a plan, with their meters."""

    user_id: str
    plan: str
    meters: tuple[str, ...]


class Held(NamedTuple):
    """Work that reserves first. Each page becomes an event of its own.

    Then the service settles the hold with `actual` units (fewer or more than were left), releases it, or abandons it as
    a producer that died.
    """

    user_id: str
    meter: str
    key: str
    reserved: int
    pages: tuple[int, ...]
    ending: Ending
    actual: int


class Emitted(NamedTuple):
    """Work reported afterwards: `quantity` units before the model's multiplier, sent `times` times."""

    user_id: str
    meter: str
    event_id: str
    quantity: int
    model: str | None
    times: int


class Charged(NamedTuple):
    """Work checked and recorded in one step."""

    user_id: str
    meter: str
    event_id: str
    amount: int


class Malformed(NamedTuple):
    """A stream entry of a careless producer, which must become a dead letter for `reason`."""

    user_id: str
    payload: str
    reason: Refusal


Work = Held | Emitted | Charged | Malformed


def make_customers(prefix: str, users: int, meters: Mapping[str, Sequence[str]]) -> list[Customer]:
    """Return `users` customers, the busiest first, named `prefix` and a number.

    Every plan of `meters` gets busy and idle ones.
    """
    plans = list(meters)
    chosen = [plans[number % len(plans)] for number in range(users)]
    return [Customer(f"{prefix}{number:05}", plan, tuple(meters[plan])) for number, plan in enumerate(chosen)]


def make_load(seed: int, size: int, customers: Sequence[Customer], name: str = "w") -> Iterator[Work]:
    """Yield `size` pieces of work of `customers`, the busiest first.

    Their keys are `name` and a number.
    """
    random = Random(seed)  # noqa: S311 (the same load for the same seed, no secret)
    weights = zipf_weights(len(customers))
    customer, kind, left = customers[0], "", 0
    for number in range(size):
        if left == 0:
            (customer,) = random.choices(customers, cum_weights=weights)
            kind = _pick(random, _KINDS)
            left = random.randint(*_BURST_LENGTHS) if random.random() < _BURST_CHANCE else 1
        left -= 1
        meter = random.choice(customer.meters)
        amount = random.randint(*_AMOUNTS.get(meter, _OTHER_AMOUNTS))
        yield _work(random, kind, customer.user_id, meter, f"{name}{number}", amount)


def largest_amount(meter: str) -> int:
    """Return the most units that one piece of work reserves or reports."""
    return _AMOUNTS.get(meter, _OTHER_AMOUNTS)[1]


def zipf_weights(count: int) -> list[float]:
    """Return cumulated weights; the n-th share is in proportion to n^-1.1."""
    return list(accumulate(1 / rank**_SKEW for rank in range(1, count + 1)))


def _work(random: Random, kind: str, user_id: str, meter: str, key: str, amount: int) -> Work:
    if kind == "malformed":
        return _malformed(random, user_id, meter, key)
    if kind == "charged":
        return Charged(user_id, meter, key, amount)
    if kind == "emitted":
        times = 2 if random.random() < _REPEATED_CHANCE else 1
        return Emitted(user_id, meter, key, amount, random.choice(_MODELS), times)
    pages: tuple[int, ...] = ()
    if random.random() < _PAGED_CHANCE:
        pages = tuple(max(1, amount // 5) for _ in range(random.randint(1, 4)))
    actual = (amount - sum(pages)) * random.randint(50, 120) // 100
    return Held(user_id, meter, key, amount, pages, _pick(random, _ENDINGS), max(0, actual))


def _malformed(random: Random, user_id: str, meter: str, key: str) -> Malformed:
    """Return a common mistake of producers.

    The payload always contains the user id, which tells the loads apart.
    """
    named = f'"event_id":"{key}","user_id":"{user_id}","meter"'
    mistakes = [
        (f'{{{named}:"{meter}","quantity":', Refusal.NOT_JSON),
        (f'{{{named}:"{meter}"}}', Refusal.MISSING_FIELD),
        (f'{{{named}:"{meter}","quantity":-5}}', Refusal.BAD_QUANTITY),
        (f'{{{named}:"{meter}","quantity":12,"price":3}}', Refusal.UNKNOWN_FIELD),
        (f'{{{named}:"steam","quantity":12}}', Refusal.UNKNOWN_METER),
        (f'{{{named}:"{meter}","quantity":12,"occurred_at":"2001-01-01T00:00:00Z"}}', Refusal.TOO_OLD),
    ]
    payload, reason = random.choice(mistakes)
    return Malformed(user_id, payload, reason)


def _pick(random: Random, chances: Mapping[Choice, int]) -> Choice:
    return random.choices(list(chances), list(chances.values()))[0]
