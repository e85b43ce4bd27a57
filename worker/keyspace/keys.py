"""Names of everything we keep in Redis, and the partition of a user.

All keys of a partition share the hash tag `{p<k>}`, so that every script touches one slot. `#` joins a user id and
a hold key: neither may contain it. A meter comes last because it has no `:`. Where a key ends in a meter, there may be
more that end in its sub-meters: what counts against the sub-cap of a backend is in both.
"""

from __future__ import annotations

from zlib import crc32

BELL = "mf:bell"
PARTITION_COUNT = "mf:partitions"
# When (ms) this Redis was found empty though the ledger was in use; 0 where both began together.
FOUND_EMPTY = "mf:found-empty"
LEADER = "mf:leader"
VERIFIED = "mf:verified"
RENEWED = "mf:renewed"
# Never there. To delete it changes nothing, and only a Redis that takes writes does so.
NOTHING = "mf:nothing"

# "Partition" of the sponsorship pool: its stream is drained like the others, under a tag of its own.
SPONSOR = -1


def drained(partitions: int) -> tuple[int, ...]:
    """Everything that is drained: so many partitions, and the pool."""
    return (*range(partitions), SPONSOR)


def shown(partition: int) -> int | str:
    """A partition as operators know it: its number, or the pool by its name."""
    return "sponsor" if partition == SPONSOR else partition


def partition_of(user_id: str, partitions: int) -> int:
    """The partition that carries all events of `user_id`: CRC-32 (IEEE, unsigned) of its UTF-8, modulo the count."""
    return crc32(user_id.encode("utf-8")) % partitions


def stream(partition: int) -> str:
    """Events not disposed of yet, oldest first; its length is the backlog."""
    return f"mf:{_tag(partition)}:events"


def rung(partition: int) -> str:
    """Set while a drain of this partition is waiting: the doorbell rings once, not once an event."""
    return f"mf:{_tag(partition)}:rung"


def hand(partition: int) -> str:
    """Hash: the range that a drain has in hand. Left behind, it tells what its owner died on."""
    return f"mf:{_tag(partition)}:hand"


def busy(partition: int) -> str:
    """Token of the drain that is alive; expires soon after its last batch began."""
    return f"mf:{_tag(partition)}:busy"


def halted(partition: int) -> str:
    """Text of the error that stopped this partition; expires, then it is tried again."""
    return f"mf:{_tag(partition)}:halted"


def paused(partition: int) -> str:
    """Says for a while what Postgres says: that this partition is left alone."""
    return f"mf:{_tag(partition)}:paused"


def recent(partition: int) -> str:
    """Hash: since how many entries ago those that are no events are counted, and how many there were."""
    return f"mf:{_tag(partition)}:recent"


def applied(partition: int, minute: int) -> str:
    """Counter of entries disposed of in one minute since the epoch, for `status`."""
    return f"mf:{_tag(partition)}:applied:{minute}"


def expiries(partition: int) -> str:
    """Sorted set: `user:meter` by the earliest moment (ms) at which one of its holds may expire."""
    return f"mf:{_tag(partition)}:expiries"


def expiring(user_id: str, meter: str) -> str:
    """Member of `expiries`."""
    return f"{user_id}:{meter}"


def owner_of_expiring(member: str) -> tuple[str, str]:
    """(user, meter) of a member of a partition's `expiries`."""
    user_id, _, meter = member.rpartition(":")
    return user_id, meter


def maps_of_expiring(partition: int, member: str) -> tuple[str, str]:
    """The pending map and the holds that a member of `expiries` stands for."""
    if partition == SPONSOR:
        return sponsor_maps(member)
    user_id, meter = owner_of_expiring(member)
    return pending(partition, user_id, meter), holds(partition, user_id, meter)


def unrolled(partition: int) -> str:
    """Set: users whose roll-ups may follow the log again."""
    return f"mf:{{p{partition}}}:unrolled"


def balance(partition: int, user_id: str) -> str:
    """Cached balance of all meters of a user, as text (see worker/rules/account.py)."""
    return f"mf:{{p{partition}}}:balance:{user_id}"


def lease(partition: int, user_id: str) -> str:
    """Right to install a balance that was read from Postgres, and since when; every publish takes it away."""
    return f"mf:{{p{partition}}}:lease:{user_id}"


def pending(partition: int, user_id: str, meter: str) -> str:
    """Hash: typed ids (`h:<hold key>`, `e:<event id>`) to units, and their sum under `total`."""
    return f"mf:{{p{partition}}}:pending:{user_id}:{meter}"


def holds(partition: int, user_id: str, meter: str) -> str:
    """Sorted set: keys of open holds by the moment (ms) they expire."""
    return f"mf:{{p{partition}}}:holds:{user_id}:{meter}"


def hold(partition: int, user_id: str, key: str) -> str:
    """Hash: one hold and, for a while after it closed, its outcome."""
    return f"mf:{{p{partition}}}:hold:{user_id}#{key}"


def charge(partition: int, user_id: str, event_id: str) -> str:
    """Hash: outcome of one charge, so that a repeat gets the first answer."""
    return f"mf:{{p{partition}}}:charge:{user_id}#{event_id}"


def pending_pattern() -> str:
    """Matches every pending map, for operators' scans."""
    return "mf:{p*}:pending:*"


def stream_pattern() -> str:
    """Matches every partition's stream, for operators' scans."""
    return "mf:{p*}:events"


def partition_pattern(partition: int) -> str:
    """Matches everything that is kept of one partition, for operators' scans."""
    return f"mf:{_tag(partition)}:*"


def balance_pattern() -> str:
    """Matches every cached balance, for operators' scans."""
    return "mf:{p*}:balance:*"


def owner_of_pending(key: str) -> tuple[str, str]:
    """(user, meter) of a pending map's key."""
    user_id, _, meter = key.split(":pending:", 1)[1].rpartition(":")
    return user_id, meter


def partition_in(key: str) -> int:
    """The partition in a key's hash tag."""
    return int(key.split("{p", 1)[1].split("}", 1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The sponsorship pool


def pool() -> str:
    """The pool as the ledger has it, as text: "epoch seq", then its units."""
    return "mf:{sponsor}:pool"


def pool_lease() -> str:
    """Right to install the pool that was read from Postgres; every publish takes it away."""
    return "mf:{sponsor}:pool-lease"


def promised() -> str:
    """Pending map of the pool: `h:<request>` held, `g:<request>` settled and not applied yet, and their `total`."""
    return "mf:{sponsor}:promised"


def sponsor_holds() -> str:
    """Sorted set: requests with an open hold by the moment (ms) it expires."""
    return "mf:{sponsor}:holds"


def sponsor_hold(request_id: str) -> str:
    """Hash: the hold of one request and, for a while after it closed, its outcome."""
    return f"mf:{{sponsor}}:hold:{request_id}"


def standing(user_id: str) -> str:
    """What the ledger knows of a user, as text: "epoch seq", then tier, start (ms) of the last window, absorbed."""
    return f"mf:{{sponsor}}:standing:{user_id}"


def standing_lease(user_id: str) -> str:
    """Right to install a standing that was read from Postgres; a change of trust takes it away."""
    return f"mf:{{sponsor}}:standing-lease:{user_id}"


def today(user_id: str) -> str:
    """Pending map of a user's open window: its `start` (ms), `h:<request>` held, `absorbed`, and their `total`."""
    return f"mf:{{sponsor}}:today:{user_id}"


def sponsor_user_holds(user_id: str) -> str:
    """Sorted set: requests of one user with an open hold by the moment (ms) it expires."""
    return f"mf:{{sponsor}}:holds:{user_id}"


def sponsor_expiring(user_id: str | None = None) -> str:
    """Member of `expiries` for the holds of the pool, or for those of one user."""
    return "pool" if user_id is None else f"user:{user_id}"


def sponsor_maps(member: str) -> tuple[str, str]:
    """The pending map and the holds that a member of the pool's `expiries` stands for."""
    kind, _, user_id = member.partition(":")
    return (promised(), sponsor_holds()) if kind == "pool" else (today(user_id), sponsor_user_holds(user_id))


def standing_pattern() -> str:
    """Matches every cached standing, for operators' scans."""
    return "mf:{sponsor}:standing:*"


def today_pattern() -> str:
    """Matches every open window, for operators' scans."""
    return "mf:{sponsor}:today:*"


def user_of_today(key: str) -> str:
    """The user in the key of a window."""
    return key.split(":today:", 1)[1]


def _tag(partition: int) -> str:
    return "{sponsor}" if partition == SPONSOR else f"{{p{partition}}}"


RING_TTL_MS = 60_000
