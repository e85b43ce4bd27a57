"""The catalogue: meters, plans with their allowances, multipliers of models.

Each process loads it from TOML and checks it once, at start. A period keeps the allowance that was in force when it
opened, so an edited catalogue changes later periods only.
"""

from __future__ import annotations

import tomllib
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from schemas import codes
from schemas.events import MAX_AMOUNT, METER_PATTERN, MULTIPLIER_PATTERN

Quantity = Annotated[int, Field(ge=0, le=MAX_AMOUNT, strict=True)]
Code = Annotated[str, Field(pattern=METER_PATTERN)]
Multiplier = Annotated[str, Field(pattern=MULTIPLIER_PATTERN)]
DIGEST_DIGITS = 12
TRUST_TIERS = codes.TRUST_TIERS
Percent = Annotated[int, Field(ge=0, le=100, strict=True)]


class CatalogueError(ValueError):
    """The catalogue does not parse or contradicts itself. The message names the key's path and the values allowed."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Meter(_Frozen):
    """A unit that plans count. With `spill = false` a finite allowance denies checks; no other bucket ever pays."""

    unit: str
    spill: bool = True


class Allowance(_Frozen):
    """The grant of a plan on one meter per period. Without a quantity it is unlimited."""

    quantity: Quantity | None = None
    cadence: Literal["subscription", "monthly", "weekly", "daily", "lifetime", "off"] = "subscription"
    anchor: Literal["sticky", "floating"] = "sticky"
    rollover_cap: Quantity = 0
    caps: dict[Literal["backend"], dict[Code, Quantity]] = {}


class Plan(_Frozen):
    """A plan. `tier` ranks plans; prices are in cents."""

    name: str
    tier: Annotated[int, Field(ge=0, strict=True)]
    price_month_cents: Quantity = 0
    price_year_cents: Quantity = 0
    trial_days: Annotated[int, Field(ge=0, le=365, strict=True)] = 0
    active: bool = True
    meters: dict[Code, Allowance]


class Sponsorship(_Frozen):
    """The sponsorship pool: its initial balance, the share of payments that flows back, budgets per trust tier."""

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
    # Of the file, and no key in it: `load_catalogue` hands it over beside the values.
    _digest: str = PrivateAttr("")

    def model_post_init(self, digest: Any, /) -> None:
        """Keep the digest."""
        self._digest = digest or ""

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> Catalogue:
        for code, plan in self.plans.items():
            for meter, allowance in plan.meters.items():
                path = f"plans.{code}.meters.{meter}"
                if meter not in self.meters:
                    raise ValueError(f"{path}: unknown meter; [meters] has {', '.join(sorted(self.meters))}")
                unknown = set(allowance.caps.get("backend", {})) - set(self.backends)
                if unknown:
                    known = ", ".join(sorted(self.backends)) or "none"
                    raise ValueError(f"{path}.caps.backend: unknown backend {sorted(unknown)[0]!r}; there are {known}")
        missing = [tier for tier in TRUST_TIERS if tier not in self.sponsorship.daily_budget]
        if missing:
            raise ValueError(f"sponsorship.daily_budget.{missing[0]}: missing")
        return self

    @property
    def digest(self) -> str:
        """Tell two catalogues apart: the first digits of the SHA-256 of the file.

        `sha256sum` shows the same digits. Empty for a catalogue that was not read from a file.
        """
        return self._digest

    @cached_property
    def spills(self) -> dict[str, bool]:
        """Meter code → does usage spill into rollover, purchased credits and debt?"""
        return {code: meter.spill for code, meter in self.meters.items()}

    @cached_property
    def capped_backends(self) -> dict[str, tuple[str, ...]]:
        """Meter code → backends with a sub-cap in some plan. Meters without sub-caps are absent."""
        found: dict[str, set[str]] = {}
        for plan in self.plans.values():
            for meter, allowance in plan.meters.items():
                if backends := allowance.caps.get("backend"):
                    found.setdefault(meter, set()).update(backends)
        return {meter: tuple(sorted(backends)) for meter, backends in found.items()}

    def plan(self, code: str) -> Plan:
        """Return the plan `code`. Raises CatalogueError that lists the known codes."""
        try:
            return self.plans[code]
        except KeyError:
            raise CatalogueError(f"plan: unknown code {code!r}; there are {', '.join(sorted(self.plans))}") from None

    def multiplier(self, model_slug: object) -> str:
        """Return the multiplier of a model as decimal text; "1" for a model that the catalogue does not list."""
        return self.multipliers.get(model_slug, "1") if isinstance(model_slug, str) else "1"


def load_catalogue(path: Path, default_plan: str | None = None) -> Catalogue:
    """Read the catalogue at `path` and check it, also for the `default_plan` of the settings.

    Raises CatalogueError that names the file, the key's path and the reason.
    """
    try:
        content = path.read_bytes()
        digest = sha256(content).hexdigest()[:DIGEST_DIGITS]
        catalogue = Catalogue.model_validate(tomllib.loads(content.decode("utf-8")), context=digest)
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CatalogueError(f"{path}: must be UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CatalogueError(f"{path}: {where + ': ' if where else ''}{reason}") from None
    if default_plan is not None and default_plan not in catalogue.plans:
        known = ", ".join(sorted(catalogue.plans))
        raise CatalogueError(f"METERFALL_DEFAULT_PLAN: unknown plan {default_plan!r}; there are {known}")
    return catalogue
