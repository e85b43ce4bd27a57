"""The client of meterfall for services. The names listed here are public; all modules below are private.

    from meterfall import Billing, UsageLimitExceeded

    with Billing.connect() as billing, billing.reserve("user-42", "premium_voice", 1_840, key="job-7f3") as hold:
        audio = synthesize(text)
        hold.settle(len(text), dimensions={"voice_slug": "narrator"})

Answers from Postgres need the extra `ledger`: `pip install 'meterfall-client[ledger]'`.
"""

from config.catalogue import CatalogueError
from config.settings import Settings, SettingsError, load_settings
from schemas.answers import (
    Answer,
    BackendRemaining,
    ChargeAnswer,
    CheckAnswer,
    CreditAnswer,
    EstimateAnswer,
    EventAnswer,
    HoldAnswer,
    HoldState,
    Parts,
    Reason,
    Remaining,
    RoutingAnswer,
    Serve,
    SettlementAnswer,
    SponsorAdvice,
    SponsorAnswer,
    SponsorHoldAnswer,
    SponsorReason,
)
from schemas.events import UsageEvent
from worker.client import AsyncBilling, AsyncHold, Billing, Hold
from worker.client.session import TrustSource
from worker.errors import (
    BadInput,
    BillingError,
    ClientBusy,
    ClientClosed,
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    LedgerUnavailable,
    PartitionMismatch,
    RedisUnavailable,
    SpoolUnavailable,
    UsageDenied,
    UsageLimitExceeded,
    WrongRedis,
)

__all__ = [
    "Answer",
    "AsyncBilling",
    "AsyncHold",
    "BackendRemaining",
    "BadInput",
    "Billing",
    "BillingError",
    "CatalogueError",
    "ChargeAnswer",
    "CheckAnswer",
    "ClientBusy",
    "ClientClosed",
    "CreditAnswer",
    "EstimateAnswer",
    "EventAnswer",
    "EventConflict",
    "Hold",
    "HoldAnswer",
    "HoldClosed",
    "HoldConflict",
    "HoldState",
    "InvalidRequest",
    "LedgerUnavailable",
    "PartitionMismatch",
    "Parts",
    "Reason",
    "RedisUnavailable",
    "Remaining",
    "RoutingAnswer",
    "Serve",
    "Settings",
    "SettingsError",
    "SettlementAnswer",
    "SponsorAdvice",
    "SponsorAnswer",
    "SponsorHoldAnswer",
    "SponsorReason",
    "SpoolUnavailable",
    "TrustSource",
    "UsageDenied",
    "UsageEvent",
    "UsageLimitExceeded",
    "WrongRedis",
    "load_settings",
]
