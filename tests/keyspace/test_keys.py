"""Names of keys, written out: an old and a new release share them while a deploy rolls. And who owns which."""

from __future__ import annotations

import pytest

from worker.keyspace import keys
from worker.keyspace.keys import SPONSORSHIP, AccountKeys, Partition, Sponsorship, Stream

PARTITION = Partition(3)
ACCOUNT = PARTITION.account("org/u:1")
METER = "credits/gemini"

NAMES: dict[str, tuple[str, ...]] = {
    "mf:{p3}:": (
        PARTITION.entries, PARTITION.rung, PARTITION.hand, PARTITION.busy, PARTITION.halted, PARTITION.failing,
        PARTITION.paused, PARTITION.recent, PARTITION.applied(29_000_000), PARTITION.expiries, PARTITION.unrolled,
        PARTITION.pattern,
    ),
    "mf:{sponsor}:": (
        SPONSORSHIP.entries, SPONSORSHIP.rung, SPONSORSHIP.hand, SPONSORSHIP.busy, SPONSORSHIP.halted,
        SPONSORSHIP.failing, SPONSORSHIP.paused, SPONSORSHIP.recent, SPONSORSHIP.applied(29_000_000),
        SPONSORSHIP.expiries, SPONSORSHIP.pattern,
    ),
}  # fmt: skip
ENDINGS = ("events", "rung", "hand", "busy", "halted", "failing", "paused", "recent", "disposed:29000000", "expiries")


def test_a_stream_of_either_kind_keeps_the_same_under_its_own_tag() -> None:
    partition, pool = NAMES.items()
    assert partition[1] == tuple(partition[0] + ending for ending in (*ENDINGS, "unrolled", "*"))
    assert pool[1] == tuple(pool[0] + ending for ending in (*ENDINGS, "*"))


def test_names_of_an_account() -> None:
    assert (ACCOUNT.balance, ACCOUNT.lease) == ("mf:{p3}:balance:org/u:1", "mf:{p3}:lease:org/u:1")
    assert ACCOUNT.pending(METER) == "mf:{p3}:pending:org/u:1:credits/gemini"
    assert ACCOUNT.holds(METER) == "mf:{p3}:holds:org/u:1:credits/gemini"
    assert (ACCOUNT.hold("k"), ACCOUNT.charge("e")) == ("mf:{p3}:hold:org/u:1#k", "mf:{p3}:charge:org/u:1#e")
    assert ACCOUNT.expiring(METER) == "org/u:1:credits/gemini"


def test_names_of_the_pool() -> None:
    names = [SPONSORSHIP.pool, SPONSORSHIP.pool_lease, SPONSORSHIP.promised, SPONSORSHIP.holds, SPONSORSHIP.hold("r")]
    names += [SPONSORSHIP.standing("u"), SPONSORSHIP.standing_lease("u"), SPONSORSHIP.today("u")]
    names.append(SPONSORSHIP.user_holds("u"))
    endings = [
        "pool",
        "pool-lease",
        "promised",
        "holds",
        "hold:r",
        "standing:u",
        "standing-lease:u",
        "today:u",
        "holds:u",
    ]
    assert names == [f"mf:{{sponsor}}:{ending}" for ending in endings]
    assert (SPONSORSHIP.expiring(), SPONSORSHIP.expiring("u")) == ("pool", "user:u")


def test_names_of_no_owner() -> None:
    names = [
        keys.BELL,
        keys.PARTITION_COUNT,
        keys.LIFE,
        keys.FOUND_EMPTY,
        keys.LEADER,
        keys.VERIFIED,
        keys.RENEWED,
        keys.NOTHING,
    ]
    endings = ["bell", "partitions", "life", "found-empty", "leader", "verified", "renewed", "nothing"]
    assert names == [f"mf:{ending}" for ending in endings]
    patterns = [keys.STREAM_PATTERN, keys.PENDING_PATTERN, keys.BALANCE_PATTERN]
    assert patterns == ["mf:{p*}:events", "mf:{p*}:pending:*", "mf:{p*}:balance:*"]
    assert [keys.STANDING_PATTERN, keys.TODAY_PATTERN] == ["mf:{sponsor}:standing:*", "mf:{sponsor}:today:*"]


def test_the_pool_cannot_be_asked_for_what_accounts_have() -> None:
    with pytest.raises(AttributeError):
        SPONSORSHIP.account("u")  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        SPONSORSHIP.unrolled  # type: ignore[attr-defined]  # noqa: B018 - asking is the test
    with pytest.raises(AttributeError):
        PARTITION.promised  # type: ignore[attr-defined]  # noqa: B018 - asking is the test
    with pytest.raises(ValueError, match="at least 0"):
        Partition(SPONSORSHIP.number)


def test_an_owner_cannot_be_changed() -> None:
    for name in ("number", "name", "prefix"):
        for stream in (PARTITION, SPONSORSHIP):
            with pytest.raises(AttributeError):
                setattr(stream, name, 7)
            with pytest.raises((AttributeError, TypeError)):
                setattr(stream, "another", 7)  # noqa: B010 - mypy knows that it has none
    with pytest.raises(AttributeError):
        ACCOUNT.user_id = "another"  # type: ignore[misc]


@pytest.mark.parametrize("stream", keys.streams(3), ids=lambda stream: str(stream.name))
def test_a_number_stands_for_a_stream_where_objects_cannot_go(stream: Stream) -> None:
    assert keys.stream_of(stream.number) == stream
    assert len({stream, keys.stream_of(stream.number)}) == 1
    assert (stream.number, stream.name) == (
        (-1, "sponsor") if isinstance(stream, Sponsorship) else (stream.number,) * 2
    )
    with pytest.raises(ValueError, match="at least 0"):
        keys.stream_of(-2)


def test_streams_are_the_partitions_and_the_pool() -> None:
    assert keys.streams(2) == (Partition(0), Partition(1), SPONSORSHIP)
    assert Partition(1) != Partition(2)


def test_whose_a_key_is() -> None:
    assert keys.account_of("org/u:1", 2**32) == AccountKeys(keys.partition_of("org/u:1", 2**32), "org/u:1")
    assert keys.owner_of_pending(ACCOUNT.pending(METER)) == ("org/u:1", METER)
    assert keys.owner_of_expiring(ACCOUNT.expiring(METER)) == ("org/u:1", METER)
    assert keys.partition_in(ACCOUNT.balance) == PARTITION
    assert keys.user_of_today(SPONSORSHIP.today("org/u:1")) == "org/u:1"
    assert PARTITION.maps_of_expiring(ACCOUNT.expiring(METER)) == (ACCOUNT.pending(METER), ACCOUNT.holds(METER))
    assert SPONSORSHIP.maps_of_expiring("pool") == (SPONSORSHIP.promised, SPONSORSHIP.holds)
    assert SPONSORSHIP.maps_of_expiring("user:u:1") == (SPONSORSHIP.today("u:1"), SPONSORSHIP.user_holds("u:1"))
