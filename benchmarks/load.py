"""The load of the benchmark: many users, few of them heavy, events as the TTS and OCR services send them.

The seed decides all but ids and times, so that two runs do the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate, islice
from random import Random
from typing import NamedTuple

from schemas.events import Scalar, UsageEvent
from worker.client.recording import new_key

PLANS = ("free", "basic", "plus", "max")
_MODELS = ("m1", "m2", "m2-turbo", "m3")
_VOICES = ("narrator", "storyteller", "newsreader", "companion")
_BACKENDS = ("gemini", "hardware")
# Voice and OCR, units of one event: a paragraph to a long page.
_METERS = {"premium_voice": ("tts", 50, 2_000), "ocr_tokens": ("ocr", 200, 4_000)}


class Use(NamedTuple):
    """One piece of work: a user's amount of a meter. Not an event yet, as it has neither id nor time."""

    user_id: str
    meter: str
    quantity: int
    source: str
    reference_id: str
    dimensions: dict[str, Scalar]


def user_names(count: int) -> list[str]:
    """Return the first `count` users."""
    return [f"user-{number:05}" for number in range(count)]


def users_of_plan(plan: str, users: Sequence[str]) -> list[str]:
    """Return the users on `plan`: the plans take turns."""
    return [user_id for number, user_id in enumerate(users) if PLANS[number % len(PLANS)] == plan]


def skewed_users(count: int, seed: int) -> Iterator[str]:
    """Yield users without end, by Zipf's law: the heaviest of 10,000 is every tenth, the lightest one in 100,000."""
    random = Random(seed)
    users = user_names(count)
    random.shuffle(users)
    weights = list(accumulate(1 / rank for rank in range(1, count + 1)))
    while True:
        yield from random.choices(users, cum_weights=weights, k=1_000)


def uses(count: int, users: int, seed: int) -> list[Use]:
    """Return `count` pieces of work of `users` skewed users."""
    random = Random(seed)
    found = []
    for user_id in islice(skewed_users(users, seed), count):
        meter = random.choice(tuple(_METERS))
        source, least, most = _METERS[meter]
        dimensions: dict[str, Scalar] = {
            "model_slug": random.choice(_MODELS),
            "voice_slug": random.choice(_VOICES),
            "document_id": f"doc-{random.randrange(10**6):06}",
            "page_idx": random.randrange(400),
            "backend": random.choice(_BACKENDS),
        }
        reference = f"variant:{random.getrandbits(48):012x}"
        found.append(Use(user_id, meter, random.randint(least, most), source, reference, dimensions))
    return found


def events(count: int, users: int, seed: int) -> list[UsageEvent]:
    """Return the same as events of now, about 350 bytes each as JSON; ids are time-ordered, as `emit` makes them."""
    return [
        UsageEvent(
            event_id=new_key(),
            user_id=use.user_id,
            meter=use.meter,
            quantity=use.quantity,
            multiplier=None,
            occurred_at=datetime.now(UTC),
            source=use.source,
            reference_id=use.reference_id,
            hold_key=None,
            dimensions=use.dimensions,
        )
        for use in uses(count, users, seed)
    ]
