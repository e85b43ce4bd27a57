"""Write the published JSON Schemas, from the models and their docstrings: `python -m schemas.export`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from schemas.answers import (
    ChargeAnswer,
    CheckAnswer,
    CreditAnswer,
    EstimateAnswer,
    EventAnswer,
    HoldAnswer,
    Remaining,
    RoutingAnswer,
    SettlementAnswer,
    SponsorAnswer,
    SponsorHoldAnswer,
)
from schemas.events import StreamEntry, UsageEvent
from schemas.notices import Notice, NoticeFeed
from schemas.overviews import (
    DebtorsReport,
    NearLimitReport,
    PurchasedReport,
    TopReport,
    UncollectedReport,
    UsageReport,
)
from schemas.reports import AccountLimits, Credits, FoundAccounts
from schemas.simulation import SimulationReport
from schemas.status import Health, ProofReport, Status

FOLDER = Path(__file__).with_name("json")
DIALECT = "https://json-schema.org/draft/2020-12/schema"

# Events and stream entries as a producer sends them, before validation; answers as a call returns them, after
# serialization.
PUBLISHED: tuple[tuple[type[BaseModel], Literal["validation", "serialization"]], ...] = (
    (UsageEvent, "validation"),
    (StreamEntry, "validation"),
    (CheckAnswer, "serialization"),
    (HoldAnswer, "serialization"),
    (EventAnswer, "serialization"),
    (ChargeAnswer, "serialization"),
    (Remaining, "serialization"),
    (RoutingAnswer, "serialization"),
    (SponsorAnswer, "serialization"),
    (SettlementAnswer, "serialization"),
    (SponsorHoldAnswer, "serialization"),
    (CreditAnswer, "serialization"),
    (EstimateAnswer, "serialization"),
    (Status, "serialization"),
    (Health, "serialization"),
    (ProofReport, "serialization"),
    (FoundAccounts, "serialization"),
    (Credits, "serialization"),
    (AccountLimits, "serialization"),
    (Notice, "serialization"),
    (NoticeFeed, "serialization"),
    (UsageReport, "serialization"),
    (TopReport, "serialization"),
    (NearLimitReport, "serialization"),
    (DebtorsReport, "serialization"),
    (PurchasedReport, "serialization"),
    (UncollectedReport, "serialization"),
    (SimulationReport, "serialization"),
)


def exported() -> dict[str, str]:
    """Return the text of each published file, by its name."""
    texts = {}
    for model, mode in PUBLISHED:
        schema = {"$schema": DIALECT, **model.model_json_schema(mode=mode)}
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", model.__name__).lower()
        texts[f"{name}.schema.json"] = json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return texts


def main() -> None:
    """Write every schema into `schemas/json`."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in exported().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
