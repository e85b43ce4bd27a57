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
# The token of the present life of this Redis; the ledger has those of all lives (worker/rules/lives.py).
LIFE = "mf:life"
# For dynos of the former release, which know no lives: when (ms) Redis was found empty; 0 if never, or acknowledged.
FOUND_EMPTY = "mf:found-empty"
# The digests of the catalogue in force and of those to come, for producers without a ledger.
CATALOGUE = "mf:catalogue"
# Hash: digest → meters of a catalogue that some process carries, and that is neither in force nor to come.
OTHER_CATALOGUES = "mf:catalogues:other"
OTHER_CATALOGUES_TTL_MS = 30 * 86_400_000
LEADER = "mf:leader"
VERIFIED = "mf:verified"
# The number of the run of the proof that is under way; a sweep lets another process go on with it if nobody does.
PROVING = "mf:proving"
RESUMED = "mf:resumed"
# The result of the last proof that ended, as JSON.
PROVED = "mf:proved"
RENEWED = "mf:renewed"
SENT_NOTICES = "mf:sent-notices"
RECOUNTED = "mf:recounted"
SUMMED_UP = "mf:summed-up"
# Hash: `host:pid:role` of a process → its last heartbeat, as JSON.
DYNOS = "mf:dynos"
# A key that never exists. Deleting it changes nothing, and succeeds only on a Redis that takes writes.
NOTHING = "mf:nothing"
# Written before a WAIT for replicas (worker/keyspace/replicas.py), and never read.
CONFIRMED = "mf:confirmed"

# For operators' scans: every partition's stream, pending map and cached balance; every cached standing, every window.
STREAM_PATTERN = "mf:{p*}:events"
PENDING_PATTERN = "mf:{p*}:pending:*"
BALANCE_PATTERN = "mf:{p*}:balance:*"
STANDING_PATTERN = "mf:{sponsor}:standing:*"
TODAY_PATTERN = "mf:{sponsor}:today:*"

RING_TTL_MS = 60_000
# The time that one counter of disposed stream entries covers: short, so that `status` shows the rate of now.
SLOT_MS = 5_000


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
    def failing(self) -> str:
        """Text of that error from the first halt until a drain ends well; it expires when nobody tries again."""
        return f"{self.prefix}failing"

    @property
    def paused(self) -> str:
        """Mark, for a while, that this stream is paused, as its row in Postgres says."""
        return f"{self.prefix}paused"

    @property
    def waiting(self) -> str:
        """Number of stream entries that wait for a catalogue, as the last drain left them; it expires soon."""
        return f"{self.prefix}waiting"

    @property
    def recent(self) -> str:
        """Hash: `from`, the first stream entry of the window; `none`, the count of those that are no events."""
        return f"{self.prefix}recent"

    @property
    def totals(self) -> str:
        """Hash: how many pending ids came and left, and how many stream entries were disposed of (see totals.py)."""
        return f"{self.prefix}totals"

    def applied(self, slot: int) -> str:
        """Counter of stream entries disposed of in one slot of time, for `status` (see `slot_of`)."""
        return f"{self.prefix}disposed:{slot}"

    def applied_untold(self, minute: int) -> str:
        """The counter of one minute of older releases, which did not write the totals."""
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

    @property
    def version(self) -> str:
        """Epoch and version of the newest balance published; it outlives the cached balance."""
        return f"{self.partition.prefix}version:{self.user_id}"

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
    def pool_version(self) -> str:
        """Epoch and seq of the newest pool published; it outlives the cached pool."""
        return f"{self.prefix}pool-version"

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


def slot_of(now_ms: int) -> int:
    """Return the slot of time of a moment (ms since the epoch), as `applied` counts by."""
    return now_ms // SLOT_MS


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
