"""Codes that command lines name. Needs the standard library only: version and help are shown without pydantic.

Everything else takes them from the module whose values carry them: schemas/events.py and config/catalogue.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args

TrustTier = Literal["new", "established", "trusted", "elite"]
# From the least trusted to the most.
TRUST_TIERS: tuple[TrustTier, ...] = get_args(TrustTier)


class Refusal(StrEnum):
    """The reason of a dead letter. One code per rule, so that a dashboard can tell a bad deploy from an attack."""

    TOO_LARGE = "too_large"
    NO_PAYLOAD = "no_payload"
    BAD_VERSION = "bad_version"
    MISSING_SIGNATURE = "missing_signature"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED_SIGNATURE = "expired_signature"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    TOO_DEEP = "too_deep"
    DUPLICATE_KEY = "duplicate_key"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_FIELD = "unknown_field"
    MISSING_FIELD = "missing_field"
    BAD_EVENT_ID = "bad_event_id"
    BAD_USER_ID = "bad_user_id"
    BAD_METER = "bad_meter"
    UNKNOWN_METER = "unknown_meter"
    BAD_QUANTITY = "bad_quantity"
    BAD_MULTIPLIER = "bad_multiplier"
    AMOUNT_OUT_OF_RANGE = "amount_out_of_range"
    BAD_OCCURRED_AT = "bad_occurred_at"
    TOO_OLD = "too_old"
    BAD_SOURCE = "bad_source"
    BAD_REFERENCE_ID = "bad_reference_id"
    BAD_HOLD_KEY = "bad_hold_key"
    BAD_DIMENSIONS = "bad_dimensions"
    WRONG_PARTITION = "wrong_partition"
    ID_CONFLICT = "id_conflict"
    DATA_ERROR = "data_error"
    POISON = "poison"
    BAD_POOL_ENTRY = "bad_pool_entry"


# No holder of a key vouched for these bytes.
SIGNATURE_REFUSALS = frozenset(
    {Refusal.MISSING_SIGNATURE, Refusal.UNKNOWN_KEY, Refusal.BAD_SIGNATURE, Refusal.EXPIRED_SIGNATURE}
)


class Role(StrEnum):
    """The role of an API key, from the one with the fewest rights; worker/rules/api_keys.py says which these are."""

    PRODUCER = "producer"
    READER = "reader"
    SUPPORT = "support"
    OPERATOR = "operator"


# The secret of an API key, and its id in it. Logs know it, to leave the rest out.
API_KEY_PATTERN = r"mf_([0-9a-f]{12})_[A-Za-z0-9_-]{43}"


class KeyRefusal(StrEnum):
    """Why an API key is refused. `wrong_role` is of a key that is right, and may not do this."""

    MISSING = "missing"
    MALFORMED = "malformed"
    UNKNOWN = "unknown"
    REVOKED = "revoked"
    EXPIRED = "expired"
    WRONG_ROLE = "wrong_role"
