"""The client of meterfall for services. The names listed here are public.

So are `meterfall.contrib.fastapi`, `meterfall.testing` and `meterfall.testing.fixtures`. All other modules are private.

    from meterfall import Billing, UsageDenied

    with Billing.connect() as billing, billing.reserve("user-42", "premium_voice", 1_840, key="job-7f3") as hold:
        audio = synthesize(text)
        hold.settle(len(text), dimensions={"voice_slug": "narrator"})

`Accounts` opens, changes and reports accounts. It needs the extra `ledger`, as do answers of `Billing` that come from
Postgres: `pip install 'meterfall-client[ledger]'`.
"""

from typing import TYPE_CHECKING

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
    LimitReached,
    Parts,
    PayFrom,
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
from schemas.notices import FeedNotice, Notice, NoticeData, NoticeFeed, TopUp
from schemas.overviews import (
    DebtFigure,
    DebtorsReport,
    NearLimitFigure,
    NearLimitReport,
    PurchasedFigure,
    PurchasedReport,
    TopFigure,
    TopReport,
    UncollectedFigure,
    UncollectedReport,
    UsageFigure,
    UsageReport,
)
from schemas.reports import (
    AccountLimits,
    Breakdown,
    BucketUnits,
    Change,
    Credits,
    CreditUse,
    DocumentUsage,
    Engagement,
    EventPage,
    EventState,
    Explanation,
    FoundAccount,
    FoundAccounts,
    GrantedCredit,
    GrantPart,
    LimitUsage,
    MeterUsage,
    PeriodUsage,
    RecordedEvent,
    RefusedEvent,
    Timeline,
    UsageSummary,
    VoiceMonth,
    VoiceUsage,
    WaitingChange,
)
from worker.client import AsyncBilling, AsyncHold, Billing, Hold, new_key
from worker.client.session import TrustSource
from worker.errors import (
    AccountError,
    BadInput,
    BillingError,
    ClientBusy,
    ClientClosed,
    EventConflict,
    HoldClosed,
    HoldConflict,
    InvalidRequest,
    KeyConflict,
    LedgerUnavailable,
    NotFound,
    OrderUsed,
    PartitionMismatch,
    RedisUnavailable,
    ReportError,
    SpoolUnavailable,
    UsageDenied,
    UsageLimitExceeded,
    WrongRedis,
)
from worker.rules.account import Account, Balance, ChangeAnswer, Parked, Waiting
from worker.rules.grants import Grant, Grants
from worker.rules.limits import Limits, Window

if TYPE_CHECKING:
    from worker.accounts import Accounts, AsyncAccounts

__all__ = [
    "Account",
    "AccountError",
    "AccountLimits",
    "Accounts",
    "Answer",
    "AsyncAccounts",
    "AsyncBilling",
    "AsyncHold",
    "BackendRemaining",
    "BadInput",
    "Balance",
    "Billing",
    "BillingError",
    "Breakdown",
    "BucketUnits",
    "CatalogueError",
    "Change",
    "ChangeAnswer",
    "ChargeAnswer",
    "CheckAnswer",
    "ClientBusy",
    "ClientClosed",
    "CreditAnswer",
    "CreditUse",
    "Credits",
    "DebtFigure",
    "DebtorsReport",
    "DocumentUsage",
    "Engagement",
    "EstimateAnswer",
    "EventAnswer",
    "EventConflict",
    "EventPage",
    "EventState",
    "Explanation",
    "FeedNotice",
    "FoundAccount",
    "FoundAccounts",
    "Grant",
    "GrantPart",
    "GrantedCredit",
    "Grants",
    "Hold",
    "HoldAnswer",
    "HoldClosed",
    "HoldConflict",
    "HoldState",
    "InvalidRequest",
    "KeyConflict",
    "LedgerUnavailable",
    "LimitReached",
    "LimitUsage",
    "Limits",
    "MeterUsage",
    "NearLimitFigure",
    "NearLimitReport",
    "NotFound",
    "Notice",
    "NoticeData",
    "NoticeFeed",
    "OrderUsed",
    "Parked",
    "PartitionMismatch",
    "Parts",
    "PayFrom",
    "PeriodUsage",
    "PurchasedFigure",
    "PurchasedReport",
    "Reason",
    "RecordedEvent",
    "RedisUnavailable",
    "RefusedEvent",
    "Remaining",
    "ReportError",
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
    "Timeline",
    "TopFigure",
    "TopReport",
    "TopUp",
    "TrustSource",
    "UncollectedFigure",
    "UncollectedReport",
    "UsageDenied",
    "UsageEvent",
    "UsageFigure",
    "UsageLimitExceeded",
    "UsageReport",
    "UsageSummary",
    "VoiceMonth",
    "VoiceUsage",
    "Waiting",
    "WaitingChange",
    "Window",
    "WrongRedis",
    "load_settings",
    "new_key",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what needs the extra `ledger`, when a host first asks for it.

        Raises ImportError that says what to install, if a package is missing.
        """
        if name not in ("Accounts", "AsyncAccounts"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from worker.accounts import Accounts, AsyncAccounts
        except ImportError as error:
            message = f"{name} needs Postgres, and a package for that is missing ({error})"
            raise ImportError(f"{message}: pip install 'meterfall-client[ledger]'") from error
        found = {"Accounts": Accounts, "AsyncAccounts": AsyncAccounts}
        globals().update(found)
        return found[name]
