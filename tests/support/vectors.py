"""The golden cases: what the rules must answer, whoever implements them."""

from __future__ import annotations

import json
from typing import Any

from tests.support.paths import ROOT


def golden_cases(name: str) -> list[dict[str, Any]]:
    """Read the cases of `tests/vectors/<name>.json`."""
    cases: list[dict[str, Any]] = json.loads((ROOT / "tests/vectors" / f"{name}.json").read_text(encoding="utf-8"))
    return cases
