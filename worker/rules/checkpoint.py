"""Checkpoints: where the proof of an account goes on the next time. Pure rules, no I/O.

A checkpoint says up to which change the rows of an account are proven, and what they had made of it by then. A chain of
digests covers these rows. A checkpoint is no proof by itself: once in `DAYS` days each account is proven from zero, and
the chain is compared.
"""

from __future__ import annotations

from datetime import date, timedelta
from hashlib import sha256
from typing import NamedTuple
from zlib import crc32

# Each account is proven from zero once in so many days.
DAYS = 30
# The form of states and of rows in the chain. Another one is no difference: the account is proven from zero.
FORM = 3
# The digest before the first row.
NOTHING = bytes(32)


class Checkpoint(NamedTuple):
    """The rows of an account are proven up to the change `seq`.

    `digest` ends the chain over them. `stands` is a hash of the stored account and its balances, to notice a change of
    these alone. `whole_on` is the day on which the account was last proven from zero. `is_sealed`: it is as the proof
    wrote it. `doubted`: a proof found a difference, so the account is proven from zero until it has none.
    """

    user_id: str
    seq: int
    digest: bytes
    form: int
    stands: int
    whole_on: date
    is_sealed: bool = True
    doubted: bool = False


def chained(digest: bytes, row: str) -> bytes:
    """Return the digest of the chain after one more row, given as text."""
    return sha256(digest + row.encode()).digest()


def is_due(user_id: str, whole_on: date, today: date) -> bool:
    """Return True if an account is to be proven from zero today.

    Each account has its day by a hash of its id, once in `DAYS` days. A day that no proof saw is made up for.
    """
    since = (today.toordinal() - crc32(user_id.encode())) % DAYS
    return not today - timedelta(days=since) <= whole_on <= today
