"""What to do about dead letters of each reason, in one line. The runbook says more."""

from __future__ import annotations

from schemas.codes import Refusal

_SEND_ANEW = "have the service send a right event, then `dead drop`"
_VOUCH = "look at each with `dead show`, then `dead replay --vouch` or `dead drop`"
_REPORT = "keep it, report it as a bug, then `dead replay` with the mended release"

REMEDIES = {
    Refusal.TOO_LARGE: f"send fewer bytes: {_SEND_ANEW}",
    Refusal.NO_PAYLOAD: f"the entry needs the field e: {_SEND_ANEW}",
    Refusal.BAD_VERSION: "deploy workers as new as the service, then `dead replay`",
    Refusal.MISSING_SIGNATURE: f"give the producer its key; {_VOUCH}",
    Refusal.UNKNOWN_KEY: f"give workers the producer's key; {_VOUCH}",
    Refusal.BAD_SIGNATURE: f"give the producer the right key, or find who forges; {_VOUCH}",
    Refusal.EXPIRED_SIGNATURE: f"give the producer the key that signs now; {_VOUCH}",
    Refusal.NOT_UTF8: _SEND_ANEW,
    Refusal.NOT_JSON: _SEND_ANEW,
    Refusal.TOO_DEEP: _SEND_ANEW,
    Refusal.DUPLICATE_KEY: _SEND_ANEW,
    Refusal.NOT_AN_OBJECT: _SEND_ANEW,
    Refusal.UNKNOWN_FIELD: "deploy workers as new as the service, then `dead replay`",
    Refusal.MISSING_FIELD: _SEND_ANEW,
    Refusal.BAD_EVENT_ID: _SEND_ANEW,
    Refusal.BAD_USER_ID: _SEND_ANEW,
    Refusal.BAD_METER: _SEND_ANEW,
    Refusal.UNKNOWN_METER: "`catalogue apply` a catalogue with the meter, then `dead replay`",
    Refusal.BAD_QUANTITY: _SEND_ANEW,
    Refusal.BAD_MULTIPLIER: _SEND_ANEW,
    Refusal.AMOUNT_OUT_OF_RANGE: f"split the work into smaller events: {_SEND_ANEW}",
    Refusal.BAD_OCCURRED_AT: _SEND_ANEW,
    Refusal.TOO_OLD: "give workers a greater METERFALL_EVENT_MAX_AGE_DAYS, restart them, then `dead replay`",
    Refusal.BAD_SOURCE: _SEND_ANEW,
    Refusal.BAD_REFERENCE_ID: _SEND_ANEW,
    Refusal.BAD_HOLD_KEY: _SEND_ANEW,
    Refusal.BAD_DIMENSIONS: _SEND_ANEW,
    Refusal.WRONG_PARTITION: "set METERFALL_PARTITIONS at the producer, then `dead replay`",
    Refusal.ID_CONFLICT: "have the service send the second event under an id of its own, then `dead drop`",
    Refusal.DATA_ERROR: _REPORT,
    Refusal.POISON: _REPORT,
    Refusal.BAD_POOL_ENTRY: "only our scripts write to the pool's stream: find who else does, then `dead drop`",
}


def remedy_of(reason: str) -> str:
    """Return what to do about letters of a reason; a reason of a newer release has none here."""
    return REMEDIES[Refusal(reason)] if reason in set(Refusal) else "ask the release that wrote it"
