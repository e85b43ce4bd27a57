"""The catalogue: meters, plans with their allowances, multipliers of models.

Each process loads it from TOML and checks it once, at start. A period keeps the allowance that was in force when it
opened, so an edited catalogue changes later periods only.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from schemas import codes
from schemas.events import MAX_AMOUNT, METER_PATTERN, MULTIPLIER_PATTERN, canonical_multiplier
from schemas.notices import RuleKind

if TYPE_CHECKING:
    from config.settings import Settings

Quantity = Annotated[int, Field(ge=0, le=MAX_AMOUNT, strict=True)]
Code = Annotated[str, Field(pattern=METER_PATTERN)]
Multiplier = Annotated[str, Field(pattern=MULTIPLIER_PATTERN)]
DIGEST_DIGITS = 12
TRUST_TIERS = codes.TRUST_TIERS
TrialDays = Annotated[int, Field(ge=0, le=365, strict=True)]
DEFAULT_RENEWAL_GRACE_HOURS = 24
THRESHOLD, EXPIRING = "balance.threshold", "grant.expiring"
DEFAULT_DAYS_BEFORE = 7


def _exact_percent(value: object) -> Decimal:
    """Return a percentage as it is written. Raises ValueError for a float, which may be another than it looks."""
    if type(value) is int or isinstance(value, Decimal):
        return Decimal(value)
    if isinstance(value, str) and re.fullmatch(MULTIPLIER_PATTERN, value):
        return Decimal(value)
    raise ValueError('must be a whole number, or decimal text with up to 6 decimals, such as "2.5"')


Percent = Annotated[Decimal, BeforeValidator(_exact_percent), Field(ge=0, le=100)]


def known_timezone(name: str) -> str:
    """Return the name of a time zone of the IANA database. Raises ValueError that names one that exists."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError, TypeError):
        raise ValueError(f"unknown time zone {str(name)[:64]!r}; must be an IANA name, as America/New_York") from None
    return name


TimeZone = Annotated[str, AfterValidator(known_timezone)]
PRICE_ALLOWED = 'decimal text above 0, such as "0.002", with up to 6 digits on each side'


def _exact_price(value: object) -> str:
    """Return a price in its shortest form. Raises ValueError for a number, which may be another than it looks."""
    if not isinstance(value, str) or not re.fullmatch(MULTIPLIER_PATTERN, value) or Decimal(value) == 0:
        raise ValueError(f"must be {PRICE_ALLOWED} (got {value!r:.32})")
    return canonical_multiplier(value)


Price = Annotated[str, BeforeValidator(_exact_price)]


class Draw(NamedTuple):
    """A meter draws on the buckets of the meter `wallet`, at `price` units of it for each of its own."""

    wallet: str
    price: str


class CatalogueError(ValueError):
    """The catalogue does not parse or contradicts itself. The message names the key's path and the values allowed."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Meter(_Frozen):
    """A unit that plans count. With `spill = false` a finite allowance denies checks; no other bucket ever pays.

    `rounding`: what becomes of a fraction of a unit that a multiplier leaves. It is carried to later events of the
    account, or each event is rounded `down` or `up`.
    """

    unit: str
    spill: bool = True
    rounding: Literal["carry", "down", "up"] = "carry"


class SpendingLimit(_Frozen):
    """The most units that an account may spend per day, week or month of the calendar, beside its allowance."""

    per: Literal["day", "week", "month"]
    amount: Annotated[int, Field(ge=1, le=MAX_AMOUNT, strict=True)]


class Allowance(_Frozen):
    """The grant of a plan on one meter per period, and its limits. Without a quantity it is unlimited.

    Or the meter has none of its own: it draws on the meter `wallet`, at a `price` for each unit. A wallet may have caps
    for the meters that draw on it, in its own units (`caps.meter`).
    """

    wallet: Code | None = None
    price: Price | None = None
    quantity: Quantity | None = None
    cadence: Literal["subscription", "monthly", "weekly", "daily", "lifetime", "off"] = "subscription"
    anchor: Literal["sticky", "floating"] = "sticky"
    rollover_cap: Quantity = 0
    caps: dict[Literal["backend", "meter"], dict[Code, Quantity]] = {}
    limits: tuple[SpendingLimit, ...] = ()

    @field_validator("limits")
    @classmethod
    def _one_per_window(cls, limits: tuple[SpendingLimit, ...]) -> tuple[SpendingLimit, ...]:
        pers = [limit.per for limit in limits]
        for per in pers:
            if pers.count(per) > 1:
                raise ValueError(f"two limits per {per}; give at most one for each of day, week and month")
        return limits

    @model_validator(mode="before")
    @classmethod
    def _draws_or_grants(cls, values: Any) -> Any:
        """Give a meter with a wallet nothing of its own: the terms of the wallet count, and none may be beside it."""
        if not isinstance(values, dict) or (values.get("wallet") is None and values.get("price") is None):
            return values
        if values.get("price") is None:
            raise ValueError(f"price: missing beside wallet; must be {PRICE_ALLOWED}")
        if values.get("wallet") is None:
            raise ValueError("wallet: missing beside price; must be the meter that pays")
        if beside := sorted(values.keys() - {"wallet", "price"}):
            raise ValueError(f"{beside[0]}: must be left out beside wallet, as the terms of the wallet count")
        return {**values, "quantity": 0, "cadence": "off"}


def granted_in_words(allowance: Allowance) -> int | str:
    """Return the quantity of an allowance; `unlimited`, or what a unit costs of the wallet, without one."""
    if allowance.wallet is not None:
        return f"{allowance.price} of {allowance.wallet} each"
    return "unlimited" if allowance.quantity is None else allowance.quantity


class Trial(_Frozen):
    """A trial of a plan: its days, and what it grants instead of the plan's allowance on these meters."""

    days: TrialDays
    meters: dict[Code, Allowance] = {}


class NoticeRule(_Frozen):
    """Something to tell accounts of a plan, on one `meter` or on each.

    `balance.threshold` has a line: `percent` of the allowance used, or units `left` to spend; and perhaps the units to
    suggest for a `top_up`. `grant.expiring` comes `days_before` the end of a grant, 7 unless it says otherwise.
    """

    kind: RuleKind
    meter: Code | None = None
    percent: Annotated[int, Field(ge=1, le=100, strict=True)] | None = None
    left: Quantity | None = None
    top_up: Annotated[int, Field(ge=1, le=MAX_AMOUNT, strict=True)] | None = None
    days_before: Annotated[int, Field(ge=1, le=365, strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_what_its_kind_needs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("kind") == THRESHOLD:
            if (values.get("percent") is None) == (values.get("left") is None):
                raise ValueError("percent, left: give one of them, percent of the allowance used or units left")
        elif unwanted := [name for name in ("percent", "left", "top_up") if values.get(name) is not None]:
            raise ValueError(f"{unwanted[0]}: only for kind = {THRESHOLD!r}")
        if values.get("kind") == EXPIRING:
            days = values.get("days_before")
            return {**values, "days_before": DEFAULT_DAYS_BEFORE if days is None else days}
        if values.get("days_before") is not None:
            raise ValueError(f"days_before: only for kind = {EXPIRING!r}")
        return values

    @property
    def name(self) -> str:
        """Tell it apart from other rules of its meter."""
        line = [(name, getattr(self, name)) for name in ("percent", "left", "days_before")]
        return ":".join([self.kind, *(f"{name}={value}" for name, value in line if value is not None)])

    def as_json(self) -> dict[str, object]:
        """Return the rule as it is written."""
        return self.model_dump(exclude_none=True)


class UnreadRule(NamedTuple):
    """A rule of notices that another release wrote, and that this one cannot read. It is kept, and tells nobody."""

    text: str

    @property
    def kind(self) -> str:
        """Return the kind that it names, if any."""
        values = self.as_json()
        return str(values.get("kind"))[:64] if isinstance(values, dict) else "?"

    def as_json(self) -> Any:
        """Return the rule as it was written."""
        return json.loads(self.text)


def stored_rule(values: object) -> NoticeRule | UnreadRule:
    """Return a rule of notices as the ledger has it: a newer release may know more kinds, or more of one."""
    try:
        return NoticeRule.model_validate(values)
    except ValidationError:
        return UnreadRule(json.dumps(values, sort_keys=True))


class Plan(_Frozen):
    """A plan. `tier` ranks plans; prices are in cents.

    Boundaries of its calendar periods keep their time of day in `timezone`, by default UTC. A trial lasts `trial_days`,
    or `trial.days` with allowances of its own. What is left of it is lost, unless `trial_rollover`. With
    `paid_by_invoice` its calendar periods refill within time that invoices paid only. `notices` are what its accounts
    are told.
    """

    name: str
    tier: Annotated[int, Field(ge=0, strict=True)]
    price_month_cents: Quantity = 0
    price_year_cents: Quantity = 0
    trial_days: TrialDays = 0
    trial: Trial | None = None
    trial_rollover: bool = False
    timezone: TimeZone | None = None
    paid_by_invoice: bool = False
    active: bool = True
    meters: dict[Code, Allowance]
    notices: tuple[NoticeRule, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _one_length_of_trial(cls, values: Any) -> Any:
        """Take the days of `trial` for `trial_days`."""
        if not isinstance(values, dict) or not isinstance(values.get("trial"), dict):
            return values
        if "trial_days" in values:
            raise ValueError("trial_days: give the days of the trial once, as trial.days")
        return {**values, "trial_days": values["trial"].get("days", 0)}

    @property
    def trial_length(self) -> timedelta:
        """How long a trial lasts unless the payment provider says otherwise."""
        return timedelta(days=self.trial_days)

    @property
    def trial_meters(self) -> dict[str, Allowance]:
        """What a trial grants, by meter."""
        return {**self.meters, **(self.trial.meters if self.trial else {})}


class Sponsorship(_Frozen):
    """The sponsorship pool: its initial balance, the share of payments that flows back, budgets per trust tier.

    The share is a whole percentage, or an exact decimal as text.
    """

    initial: Quantity
    paid_share_percent: Percent
    daily_budget: dict[codes.TrustTier, Quantity]


class Backend(_Frozen):
    """A backend that does the work; `hardware` backends are the host's own machines."""

    kind: Literal["hosted", "hardware"]


class Catalogue(_Frozen):
    """The whole catalogue, checked: every plan refers to meters and backends that exist."""

    meters: dict[Code, Meter]
    plans: dict[Code, Plan]
    multipliers: dict[str, Multiplier] = {}
    sponsorship: Sponsorship
    backends: dict[Code, Backend] = {}
    # No keys of the file: `parse_catalogue` hands them over beside its values.
    _text: str = PrivateAttr("")
    _fingerprint: str = PrivateAttr("")
    _renewal_grace: timedelta = PrivateAttr(timedelta(hours=DEFAULT_RENEWAL_GRACE_HOURS))

    def model_post_init(self, beside: Any, /) -> None:
        """Keep what is no key of the file."""
        if beside is not None:
            self._text, self._fingerprint, self._renewal_grace = beside

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> Catalogue:
        for code, plan in self.plans.items():
            granted = [(f"plans.{code}.meters.{meter}", meter, allowance) for meter, allowance in plan.meters.items()]
            on_trial = plan.trial.meters.items() if plan.trial else ()
            granted += [(f"plans.{code}.trial.meters.{meter}", meter, allowance) for meter, allowance in on_trial]
            for path, meter, allowance in granted:
                if meter not in self.meters:
                    raise ValueError(f"{path}: unknown meter; [meters] has {', '.join(sorted(self.meters))}")
                unknown = set(allowance.caps.get("backend", {})) - set(self.backends)
                if unknown:
                    known = ", ".join(sorted(self.backends)) or "none"
                    raise ValueError(f"{path}.caps.backend: unknown backend {sorted(unknown)[0]!r}; there are {known}")
            self._draw_on_what_exists(f"plans.{code}.meters", plan.meters, plan.meters, plan.meters)
            if plan.trial:
                at = f"plans.{code}.trial.meters"
                self._draw_on_what_exists(at, plan.trial.meters, plan.trial_meters, plan.meters)
        self._checks_notices()
        missing = [tier for tier in TRUST_TIERS if tier not in self.sponsorship.daily_budget]
        if missing:
            raise ValueError(f"sponsorship.daily_budget.{missing[0]}: missing")
        return self

    def _draw_on_what_exists(
        self,
        path: str,
        granted: Mapping[str, Allowance],
        beside: Mapping[str, Allowance],
        opened: Mapping[str, Allowance],
    ) -> None:
        """Raise ValueError for a wallet, or a cap inside one, that cannot be.

        `beside` are all meters of the plan, or of its trial; `opened` those that each account of the plan has.
        """
        for meter, allowance in granted.items():
            at, wallet = f"{path}.{meter}", allowance.wallet
            if wallet is not None:
                if wallet not in self.meters:
                    known = ", ".join(sorted(self.meters))
                    raise ValueError(f"{at}.wallet: unknown meter {wallet!r}; [meters] has {known}")
                if wallet == meter:
                    raise ValueError(f"{at}.wallet: must be another meter than {meter} itself")
                if wallet not in beside:
                    raise ValueError(f"{at}.wallet: the plan grants nothing on {wallet}; add {wallet} to its meters")
                if beside[wallet].wallet is not None:
                    raise ValueError(f"{at}.wallet: {wallet} draws on a wallet itself, {beside[wallet].wallet}")
                if drawing := sorted(other for other in beside if beside[other].wallet == meter):
                    raise ValueError(f"{at}.wallet: {meter} is a wallet itself, that of {drawing[0]}")
                if missing := sorted({meter, wallet} - opened.keys()):
                    raise ValueError(f"{at}.wallet: {missing[0]} is no meter of the plan after its trial; add it")
                if meter in self.backends:  # what it draws would count against the sub-cap of that
                    raise ValueError(f"{at}.wallet: [backends] has {meter} also; rename one of them")
                if self.meters[meter].rounding != "carry":
                    rounding = self.meters[meter].rounding
                    raise ValueError(f'{at}.wallet: {meter} has rounding = "{rounding}"; must be "carry" to draw')
            for capped in allowance.caps.get("meter", {}):
                if capped not in beside or beside[capped].wallet != meter:
                    raise ValueError(f"{at}.caps.meter: {capped!r} does not draw on {meter} in this plan")

    def draws(self, plan: str, *, on_trial: bool = False) -> Mapping[str, Draw]:
        """Return the meters of a plan, or of its trial, that draw on a wallet, with wallet and price."""
        return self.draws_of_plans.get((plan, on_trial), {})

    @cached_property
    def plans_with_wallets(self) -> frozenset[str]:
        """The plans with a meter that draws on another one, in their trial perhaps."""
        return frozenset(plan for plan, _ in self.draws_of_plans)

    @cached_property
    def draws_of_plans(self) -> dict[tuple[str, bool], dict[str, Draw]]:
        """(plan, on trial) → the meters that draw on a wallet; those without any are absent."""
        found = {}
        for code, plan in self.plans.items():
            for on_trial, meters in ((False, plan.meters), (True, plan.trial_meters)):
                drawing = {
                    meter: Draw(allowance.wallet, allowance.price)
                    for meter, allowance in meters.items()
                    if allowance.wallet is not None and allowance.price is not None
                }
                if drawing:
                    found[code, on_trial] = drawing
        return found

    def _checks_notices(self) -> None:
        for code, plan in self.plans.items():
            seen: set[tuple[str | None, str]] = set()
            for at, rule in enumerate(plan.notices):
                path = f"plans.{code}.notices.{at}"
                if rule.meter is not None and rule.meter not in self.meters:
                    raise ValueError(f"{path}.meter: unknown meter; [meters] has {', '.join(sorted(self.meters))}")
                if (rule.meter, rule.name) in seen:
                    raise ValueError(f"{path}: {rule.name} is there twice for the same meter")
                seen.add((rule.meter, rule.name))

    @property
    def digest(self) -> str:
        """Tell two catalogues apart for people: the first digits of the `fingerprint`."""
        return self._fingerprint[:DIGEST_DIGITS]

    @property
    def fingerprint(self) -> str:
        """Tell two catalogues apart: the SHA-256 of the values of the file, in hexadecimal digits.

        Comments, white space and the order of keys do not matter. Empty for a catalogue that no text was read for.
        """
        return self._fingerprint

    @property
    def text(self) -> str:
        """The text of the file, in TOML. Empty for a catalogue that no text was read for."""
        return self._text

    def with_additions_of(self, later: Catalogue) -> Catalogue:
        """Return this catalogue, with the plans and meters that only `later` has, and what plans grant on these meters.

        All that this catalogue says stays as it is. An event may name a meter, or its account may have a plan, before
        the catalogue came into force that brought it.
        """
        new = later.meters.keys() - self.meters.keys()
        if not new and later.plans.keys() <= self.plans.keys():
            return self
        plans = {**later.plans, **self.plans}
        for code in self.plans.keys() & later.plans.keys():
            granted = {meter: allowance for meter, allowance in later.plans[code].meters.items() if meter in new}
            plans[code] = plans[code].model_copy(update={"meters": _with_granted(plans[code].meters, granted)})
        values = {
            "meters": {**self.meters, **{meter: later.meters[meter] for meter in sorted(new)}},
            "plans": plans,
            "multipliers": self.multipliers,
            "sponsorship": self.sponsorship,
            "backends": {**later.backends, **self.backends},
        }
        return Catalogue.model_validate(values, context=(self._text, self._fingerprint, self._renewal_grace))

    @cached_property
    def renewal_grace(self) -> timedelta:
        """How long a period lasts that no invoice has paid yet, after a paid one. Zero: the old one stays open."""
        return self._renewal_grace

    @cached_property
    def spills(self) -> dict[str, bool]:
        """Meter code → does usage spill into rollover, purchased credits and debt?"""
        return {code: meter.spill for code, meter in self.meters.items()}

    @cached_property
    def roundings(self) -> dict[str, str]:
        """Meter code → what becomes of a fraction of a unit."""
        return {code: meter.rounding for code, meter in self.meters.items()}

    @cached_property
    def capped_backends(self) -> dict[str, tuple[str, ...]]:
        """Meter code → backends with a sub-cap in some plan. Meters without sub-caps are absent."""
        found: dict[str, set[str]] = {}
        for plan in self.plans.values():
            for meter, allowance in plan.meters.items():
                if backends := allowance.caps.get("backend"):
                    found.setdefault(meter, set()).update(backends)
        return {meter: tuple(sorted(backends)) for meter, backends in found.items()}

    def notice_rules(self, code: str) -> tuple[NoticeRule, ...]:
        """Return what accounts on a plan are told; nothing of a plan that is not in the catalogue."""
        plan = self.plans.get(code)
        return plan.notices if plan is not None else ()

    def plan(self, code: str) -> Plan:
        """Return the plan `code`. Raises CatalogueError that lists the known codes."""
        try:
            return self.plans[code]
        except (KeyError, TypeError):  # the second of a value that is no text
            raise CatalogueError(
                f"plan: unknown code {code!r:.64}; there are {', '.join(sorted(self.plans))}"
            ) from None

    def multiplier(self, model_slug: object) -> str:
        """Return the multiplier of a model as decimal text; "1" for a model that the catalogue does not list."""
        return self.multipliers.get(model_slug, "1") if isinstance(model_slug, str) else "1"


def _with_granted(own: Mapping[str, Allowance], granted: Mapping[str, Allowance]) -> dict[str, Allowance]:
    """Return the meters of a plan with those that came later, but for wallets and caps that it has no part in."""
    meters = {**own, **granted}
    for meter, allowance in granted.items():
        if allowance.wallet is None:
            continue
        payer = meters.get(allowance.wallet)
        if payer is None or payer.wallet is not None:
            del meters[meter]
    for meter in granted.keys() & meters.keys():
        capped = meters[meter].caps.get("meter", {})
        kept = {each: cap for each, cap in capped.items() if each in meters and meters[each].wallet == meter}
        if kept != capped:
            meters[meter] = meters[meter].model_copy(update={"caps": {**meters[meter].caps, "meter": kept}})
    return meters


def load_catalogue(
    path: Path,
    default_plan: str | None = None,
    *,
    renewal_grace_hours: int = DEFAULT_RENEWAL_GRACE_HOURS,
    sponsor_initial_units: int | None = None,
) -> Catalogue:
    """Read the catalogue at `path` and check it, also for the `default_plan` of the settings.

    `renewal_grace_hours` and `sponsor_initial_units` are the settings of these names, by which its periods go and its
    pool opens.

    Raises CatalogueError that names the file, the key's path and the reason.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CatalogueError(f"{path}: must be UTF-8") from None
    return parse_catalogue(
        text,
        str(path),
        default_plan,
        renewal_grace_hours=renewal_grace_hours,
        sponsor_initial_units=sponsor_initial_units,
    )


def catalogue_of(settings: Settings) -> Catalogue:
    """Return the catalogue that a process with these settings carries. Raises CatalogueError."""
    try:
        return load_catalogue(
            settings.catalogue_path,
            settings.default_plan,
            renewal_grace_hours=settings.renewal_grace_hours,
            sponsor_initial_units=settings.sponsor_initial_units,
        )
    except CatalogueError as error:
        named = str(error).startswith("METERFALL_")
        raise error if named else CatalogueError(f"METERFALL_CATALOGUE_PATH: {error}") from None


def parse_with_settings(
    text: str,
    name: str,
    settings: Settings,
    default_plan: str | None = None,
    *,
    unread: list[UnreadRule] | None = None,
) -> Catalogue:
    """Return `parse_catalogue` under these settings, of which it takes the default plan only if that is given."""
    return parse_catalogue(
        text,
        name,
        default_plan,
        renewal_grace_hours=settings.renewal_grace_hours,
        sponsor_initial_units=settings.sponsor_initial_units,
        unread=unread,
    )


def parse_catalogue(
    text: str,
    name: str,
    default_plan: str | None = None,
    *,
    renewal_grace_hours: int = DEFAULT_RENEWAL_GRACE_HOURS,
    sponsor_initial_units: int | None = None,
    unread: list[UnreadRule] | None = None,
) -> Catalogue:
    """Check a catalogue given as TOML. `name` stands for it in errors; see `load_catalogue` for the settings.

    With `unread` it is one that is in force: rules of notices that this release cannot read go there, and stop nothing.
    Raises CatalogueError that names it, the key's path and the reason.
    """
    try:
        values = tomllib.loads(text)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
        beside = text, sha256(canonical.encode()).hexdigest(), timedelta(hours=renewal_grace_hours)
        if unread is not None:
            unread.extend(_take_out_unread(values))
        catalogue = Catalogue.model_validate(values, context=beside)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{name}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CatalogueError(f"{name}: {where + ': ' if where else ''}{reason}") from None
    if default_plan is not None and default_plan not in catalogue.plans:
        known = ", ".join(sorted(catalogue.plans))
        raise CatalogueError(f"METERFALL_DEFAULT_PLAN: unknown plan {default_plan!r}; there are {known}")
    if sponsor_initial_units is not None:
        pool = catalogue.sponsorship.model_copy(update={"initial": sponsor_initial_units})
        catalogue = catalogue.model_copy(update={"sponsorship": pool})
    return catalogue


def _take_out_unread(values: Mapping[str, Any]) -> Iterator[UnreadRule]:
    """Take rules of notices that this release cannot read out of the plans of a catalogue, and yield them."""
    plans = values.get("plans")
    for plan in plans.values() if isinstance(plans, dict) else ():
        if isinstance(plan, dict) and isinstance(plan.get("notices"), list):
            found = [(values, stored_rule(values)) for values in plan["notices"]]
            plan["notices"] = [values for values, rule in found if isinstance(rule, NoticeRule)]
            yield from (rule for _, rule in found if isinstance(rule, UnreadRule))
