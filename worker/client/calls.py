"""The scripts that the calls run: their keys and arguments, from settings and catalogue."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.events import UsageEvent, multiplied
from worker.client.session import Context
from worker.keyspace.keys import RING_TTL_MS, AccountKeys, Partition
from worker.keyspace.scripts import Call, call
from worker.rules import account as rules_account
from worker.rules.preflight import (
    Asked,
)


def sub_meters_of(context: Context, meter: str) -> list[str]:
    """Names of all sub-caps that plans have on this meter."""
    return [rules_account.sub_meter(meter, backend) for backend in context.catalogue.capped_backends.get(meter, ())]


def sub_meter_of(context: Context, event: UsageEvent) -> str | None:
    """Name of the sub-cap that this event counts against, None where no plan has one."""
    backend = (event.dimensions or {}).get("backend")
    capped_backends = context.catalogue.capped_backends.get(event.meter, ())
    return (
        rules_account.sub_meter(event.meter, backend)
        if isinstance(backend, str) and backend in capped_backends
        else None
    )


def release_call(context: Context, user_id: str, meter: str, key: str, *, late: bool = False) -> Call:
    """The script that gives a hold back."""
    account = context.account(user_id)
    names = [account.pending(meter), account.holds(meter), account.hold(key)]
    names += _sub_keys(account, sub_meters_of(context, meter))
    return call("release", names, [key, context.outcome_ttl_ms, int(late)])


def settle_call(context: Context, account: AccountKeys, event: UsageEvent) -> Call:
    meter, key = event.meter, event.hold_key or event.event_id
    names = [account.pending(meter), account.holds(meter), account.hold(key)]
    names += [account.partition.entries, account.partition.rung]
    args: list[str | int | bytes] = [key, event.event_id, amount_of(event), *signed_payload(context, event)]
    args += (RING_TTL_MS, context.outcome_ttl_ms)
    counted = sub_meter_of(context, event)
    for sub_meter in sub_meters_of(context, meter):
        names.append(account.pending(sub_meter))
        if sub_meter == counted:
            args.append(len(names))
        names.append(account.holds(sub_meter))
    return call("settle", names, args)


def append_call(context: Context, partition: Partition, batch: Sequence[UsageEvent]) -> Call:
    """The script that appends `batch`: an event that names a hold settles it."""
    if batch[0].hold_key is not None:
        return settle_call(context, partition.account(batch[0].user_id), batch[0])
    names = [partition.entries, partition.rung]
    args: list[str | int | bytes] = [RING_TTL_MS]
    for event in batch:
        account = partition.account(event.user_id)
        names.append(account.pending(event.meter))
        args += (event.event_id, amount_of(event), *signed_payload(context, event))
        if (sub_meter := sub_meter_of(context, event)) is not None:
            names.append(account.pending(sub_meter))
            args += (event.event_id, amount_of(event), "", "")
    return call("emit", names, args)


def payload(event: UsageEvent) -> str:
    """The event as it stands in the stream."""
    return event.model_dump_json(exclude_none=True)


def signed_payload(context: Context, event: UsageEvent) -> tuple[bytes, str]:
    """The event as it travels, and its signature; '' where this process has no key."""
    text = payload(event).encode()
    return text, context.signer.sign(text) if context.signer is not None else ""


def amount_of(event: UsageEvent) -> int:
    """What a priced event costs, in units of its meter."""
    return multiplied(event.quantity, event.multiplier or "1")


def capped_backends(context: Context, meter: str, backend: str | None) -> tuple[str, ...]:
    """The backend, if any plan has a sub-cap for it on this meter; else nothing: then no sub-meter is kept."""
    return (backend,) if backend in context.catalogue.capped_backends.get(meter, ()) and backend is not None else ()


def _sub_keys(account: AccountKeys, sub_meters: Sequence[str]) -> list[str]:
    """Pending and holds of each of these sub-meters."""
    return [name(sub_meter) for sub_meter in sub_meters for name in (account.pending, account.holds)]


def _gate_keys(account: AccountKeys, meter: str) -> list[str]:
    return [account.balance, account.pending(meter), account.holds(meter)]


def check_call(context: Context, asked: Asked, backends: Sequence[str]) -> Call:
    account = context.account(asked.user_id)
    sub_meters = [rules_account.sub_meter(asked.meter, each) for each in backends]
    names = _gate_keys(account, asked.meter) + _sub_keys(account, sub_meters)
    return call("check", names, [asked.meter, asked.amount, *sub_meters])


def reserve_call(context: Context, asked: Asked, key: str, ttl: int, force: str) -> Call:
    user_id, meter, amount, backend = asked
    account = context.account(user_id)
    sub_meters = [rules_account.sub_meter(meter, each) for each in capped_backends(context, meter, backend)]
    names = _gate_keys(account, meter)
    names += [account.hold(key), account.partition.expiries]
    names += _sub_keys(account, sub_meters)
    args: list[str | int | bytes] = [meter, amount, key, ttl * 1_000, context.outcome_ttl_ms]
    args += (account.expiring(meter), force)
    for sub_meter in sub_meters:
        args += (account.expiring(sub_meter), sub_meter)
    return call("reserve", names, args)
