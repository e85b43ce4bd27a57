"""Names of everything we keep in Redis, and the partition of a user.

All keys of a partition share the hash tag `{p<k>}`, so that every script touches one slot. `#` joins a user id and
a hold key: neither may contain it. A meter comes last because it has no `:`. Where a key ends in a meter, there may be
more that end in its sub-meters: what counts against the sub-cap of a backend is in both.
"""

from __future__ import annotations

from zlib import crc32

BELL = "mf:bell"
PARTITION_COUNT = "mf:partitions"
LEADER = "mf:leader"
VERIFIED = "mf:verified"
RENEWED = "mf:renewed"


def partition_of(user_id: str, partitions: int) -> int:
    """The partition that carries all events of `user_id`: CRC-32 (IEEE, unsigned) of its UTF-8, modulo the count."""
    return crc32(user_id.encode("utf-8")) % partitions


def sub_meter(meter: str, backend: str) -> str:
    """Name under which a sub-cap is kept: a meter of its own, as `/` occurs in no meter and no backend."""
    return f"{meter}/{backend}"


def backend_of(meter: str) -> str | None:
    """The backend in the name of a sub-cap; None for a meter."""
    return meter.partition("/")[2] or None


def is_sub_meter(meter: str) -> bool:
    """True for the name of a sub-cap: what it counts, its meter counts as well."""
    return "/" in meter


def stream(partition: int) -> str:
    """Events not disposed of yet, oldest first; its length is the backlog."""
    return f"mf:{{p{partition}}}:events"


def rung(partition: int) -> str:
    """Set while a drain of this partition is waiting: the doorbell rings once, not once an event."""
    return f"mf:{{p{partition}}}:rung"


def hand(partition: int) -> str:
    """Hash: the range that a drain has in hand. Left behind, it tells what its owner died on."""
    return f"mf:{{p{partition}}}:hand"


def busy(partition: int) -> str:
    """Token of the drain that is alive; expires soon after its last batch began."""
    return f"mf:{{p{partition}}}:busy"


def halted(partition: int) -> str:
    """Text of the error that stopped this partition; expires, then it is tried again."""
    return f"mf:{{p{partition}}}:halted"


def applied(partition: int, minute: int) -> str:
    """Counter of entries disposed of in one minute since the epoch, for `status`."""
    return f"mf:{{p{partition}}}:applied:{minute}"


def expiries(partition: int) -> str:
    """Sorted set: `user:meter` by the earliest moment (ms) at which one of its holds may expire."""
    return f"mf:{{p{partition}}}:expiries"


def expiring(user_id: str, meter: str) -> str:
    """Member of `expiries`."""
    return f"{user_id}:{meter}"


def owner_of_expiring(member: str) -> tuple[str, str]:
    """(user, meter) of a member of `expiries`."""
    user_id, _, meter = member.rpartition(":")
    return user_id, meter


def balance(partition: int, user_id: str) -> str:
    """Cached balance of all meters of a user, as text (see worker/snapshot.py)."""
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
