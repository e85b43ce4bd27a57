"""The names of all our keys in Redis, one small class for each kind of owner.

Workers drain a `Stream`: a `Partition`, or `SPONSORSHIP`. The keys of an account are in its partition; the pool has no
accounts, so to ask it for one is a type error.

All keys of a stream share a hash tag, `{p<k>}` or `{sponsor}`, so that every script touches one slot. `#` joins a user
id and a hold key: neither may contain it. A meter comes last because it has no `:`. Beside a key that ends in a meter
there may be keys that end in its sub-meters: an id that counts against the sub-cap of a backend is in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple
from zlib import crc32

BELL = "mf:bell"
PARTITION_COUNT = "mf:partitions"
# The time (ms) at which a process found this Redis empty with a ledger in use; 0 if both began together.
FOUND_EMPTY = "mf:found-empty"
LEADER = "mf:leader"
VERIFIED = "mf:verified"
RENEWED = "mf:renewed"
# A key that never exists. Deleting it changes nothing, and succeeds only on a Redis that takes writes.
NOTHING = "mf:nothing"

# For operators' scans: every partition's stream, pending map and cached balance; every cached standing, every window.
STREAM_PATTERN = "mf:{p*}:events"
PENDING_PATTERN = "mf:{p*}:pending:*"
BALANCE_PATTERN = "mf:{p*}:balance:*"
STANDING_PATTERN = "mf:{sponsor}:standing:*"
TODAY_PATTERN = "mf:{sponsor}:today:*"

RING_TTL_MS = 60_000


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@dataclass(frozen=True, slots=True)
class _Stream:
    """Waiting stream entries, and the notes of drains and supervisors about them."""

    # Its number in job arguments, at the doorbell and in Postgres; `stream_of` is the way back.
    number: int
    # Its name for operators.
    name: int | str = field(compare=False)
    prefix: str = field(compare=False, repr=False)

    @property
    def entries(self) -> str:
        """Stream: stream entries not disposed of yet, oldest first; its length is the backlog."""
        return f"{self.prefix}events"

    @property
    def rung(self) -> str:
        """Set while a drain of this stream waits: the doorbell rings once for it."""
        return f"{self.prefix}rung"

    @property
    def hand(self) -> str:
        """Hash: the range that a drain has in hand; if the drain died, the range on which it died."""
        return f"{self.prefix}hand"

    @property
    def busy(self) -> str:
        """Token of the drain that is alive; expires soon after its last batch began."""
        return f"{self.prefix}busy"

    @property
    def halted(self) -> str:
        """Text of the error that stopped this stream; after it expires, workers try again."""
        return f"{self.prefix}halted"

    @property
    def paused(self) -> str:
        """Mark, for a while, that this stream is paused, as its row in Postgres says."""
        return f"{self.prefix}paused"

    @property
    def recent(self) -> str:
        """Hash: `from`, the first stream entry of the window; `none`, the count of those that are no events."""
        return f"{self.prefix}recent"

    def applied(self, minute: int) -> str:
        """Counter of stream entries disposed of in one minute since the epoch, for `status`."""
        return f"{self.prefix}applied:{minute}"

    @property
    def expiries(self) -> str:
        """Sorted set: owners of open holds, by the moment (ms) at which the first may expire."""
        return f"{self.prefix}expiries"

    @property
    def pattern(self) -> str:
        """Pattern of all keys of this stream, for operators' scans."""
        return f"{self.prefix}*"


class Partition(_Stream):
    """One of the streams of usage events, and the accounts of these events."""

    __slots__ = ()

    def __init__(self, number: int) -> None:
        """Raise ValueError for a number below 0: no partition has it."""
        if number < 0:
            raise ValueError(f"number: a partition's is at least 0 (got {number})")
        super().__init__(number, number, f"mf:{{p{number}}}:")

    @property
    def unrolled(self) -> str:
        """Set: users with roll-ups to update."""
        return f"{self.prefix}unrolled"

    def account(self, user_id: str) -> AccountKeys:
        """Return the keys of an account of this partition."""
        return AccountKeys(self, user_id)

    def maps_of_expiring(self, member: str) -> tuple[str, str]:
        """The pending map and the holds that a member of `expiries` stands for."""
        user_id, meter = owner_of_expiring(member)
        account = self.account(user_id)
        return account.pending(meter), account.holds(meter)


class AccountKeys(NamedTuple):
    """The keys of one account, in its partition."""

    partition: Partition
    user_id: str

    @property
    def balance(self) -> str:
        """Cached balance of all meters, as text (see worker/keyspace/cache.py)."""
        return f"{self.partition.prefix}balance:{self.user_id}"

    @property
    def lease(self) -> str:
        """Right to install a balance from Postgres, and its start; a publish ends it."""
        return f"{self.partition.prefix}lease:{self.user_id}"

    def pending(self, meter: str) -> str:
        """Hash: units by `h:<hold key>` and `e:<event id>`, and `total`, their sum."""
        return f"{self.partition.prefix}pending:{self.user_id}:{meter}"

    def holds(self, meter: str) -> str:
        """Sorted set: keys of open holds by the moment (ms) they expire."""
        return f"{self.partition.prefix}holds:{self.user_id}:{meter}"

    def hold(self, key: str) -> str:
        """Hash: one hold and, for a while after it closed, its outcome."""
        return f"{self.partition.prefix}hold:{self.user_id}#{key}"

    def charge(self, event_id: str) -> str:
        """Hash: outcome of one charge, so that a repeat gets the first answer."""
        return f"{self.partition.prefix}charge:{self.user_id}#{event_id}"

    def expiring(self, meter: str) -> str:
        """Member of the partition's `expiries` for the holds on one meter."""
        return f"{self.user_id}:{meter}"


class Sponsorship(_Stream):
    """The sponsorship pool: workers drain its stream like those of the partitions."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(-1, "sponsor", "mf:{sponsor}:")

    @property
    def pool(self) -> str:
        """The pool by the ledger, as text: "epoch seq", then its units."""
        return f"{self.prefix}pool"

    @property
    def pool_lease(self) -> str:
        """Right to install the pool from Postgres; every publish ends it."""
        return f"{self.prefix}pool-lease"

    @property
    def promised(self) -> str:
        """Hash: `h:<request>` held, `g:<request>` settled but not applied, and `total`."""
        return f"{self.prefix}promised"

    @property
    def holds(self) -> str:
        """Sorted set: requests with an open hold by the moment (ms) it expires."""
        return f"{self.prefix}holds"

    def hold(self, request_id: str) -> str:
        """Hash: the hold of one request and, for a while after it closed, its outcome."""
        return f"{self.prefix}hold:{request_id}"

    def standing(self, user_id: str) -> str:
        """A user's standing by the ledger, as text (see worker/keyspace/cache.py)."""
        return f"{self.prefix}standing:{user_id}"

    def standing_lease(self, user_id: str) -> str:
        """Right to install a standing from Postgres; a change of trust ends it."""
        return f"{self.prefix}standing-lease:{user_id}"

    def today(self, user_id: str) -> str:
        """Hash: a user's window: `start` (ms), `h:<request>` held, `absorbed`, `total`."""
        return f"{self.prefix}today:{user_id}"

    def user_holds(self, user_id: str) -> str:
        """Sorted set: requests with an open hold of one user, by the moment it expires."""
        return f"{self.prefix}holds:{user_id}"

    def expiring(self, user_id: str | None = None) -> str:
        """Member of `expiries` for the holds of the pool, or for those of one user."""
        return "pool" if user_id is None else f"user:{user_id}"

    def maps_of_expiring(self, member: str) -> tuple[str, str]:
        """The pending map and the holds that a member of `expiries` stands for."""
        kind, _, user_id = member.partition(":")
        return (self.promised, self.holds) if kind == "pool" else (self.today(user_id), self.user_holds(user_id))


Stream = Partition | Sponsorship

SPONSORSHIP = Sponsorship()

# Cached: a producer needs one for every event.
_partition = cache(Partition)


def partition_of(user_id: str, partitions: int) -> Partition:
    """Return the partition of all events of `user_id`.

    CRC-32 (IEEE, unsigned) of its UTF-8, modulo the number of partitions: producers in any language do the same.
    """
    return _partition(crc32(user_id.encode("utf-8")) % partitions)


def account_of(user_id: str, partitions: int) -> AccountKeys:
    """Return the keys of the account `user_id`, with this number of partitions."""
    return AccountKeys(partition_of(user_id, partitions), user_id)


def partitions_of(count: int) -> tuple[Partition, ...]:
    """Return all of `count` partitions."""
    return tuple(map(_partition, range(count)))


def streams(partitions: int) -> tuple[Stream, ...]:
    """Return all streams that workers drain, with this number of partitions."""
    return (*partitions_of(partitions), SPONSORSHIP)


def stream_of(number: int) -> Stream:
    """Return the stream with this `number`. Raises ValueError if there is none."""
    return SPONSORSHIP if number == SPONSORSHIP.number else _partition(number)


# ---------------------------------------------------------------------------------------------------------------------
# Owners of keys


def owner_of_pending(key: str) -> tuple[str, str]:
    """Return (user, meter) of a pending map's key."""
    user_id, _, meter = key.split(":pending:", 1)[1].rpartition(":")
    return user_id, meter


def owner_of_expiring(member: str) -> tuple[str, str]:
    """Return (user, meter) of a member of a partition's `expiries`."""
    user_id, _, meter = member.rpartition(":")
    return user_id, meter


def partition_in(key: str) -> Partition:
    """Return the partition in a key's hash tag."""
    return _partition(int(key.split("{p", 1)[1].split("}", 1)[0]))


def user_of_today(key: str) -> str:
    """Return the user in the key of a window."""
    return key.split(":today:", 1)[1]
