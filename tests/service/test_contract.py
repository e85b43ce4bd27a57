"""The service keeps to its OpenAPI document, whatever it is sent: requests that schemathesis makes of the document."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from config.settings import Settings
from schemas.codes import Role
from tests.support.ledger import give_accounts
from tests.support.serving import Served
from worker.rules.api_keys import RIGHTS
from worker.service.access import OPERATIONS
from worker.service.openapi import FILE

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
# A run makes requests for as long; what it has found by then counts.
RUN_SECONDS = 18
# Most random texts name nothing. So requests that keep to the document name what there is.
NAMES: Mapping[str, list[str]] = {
    "user_id": ["user-42", "user-43"],
    "meter": ["premium_voice"],
    "plan": ["basic", "max"],
    "key": ["key-1", "key-2"],
    "event_id": ["event-1", "event-2"],
}


def named(value: Any) -> Any:
    """A part of the document in which the fields and parameters of `NAMES` have these values only."""
    if isinstance(value, list):
        return [named(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("in") == "query" and value["name"] in NAMES:
        return {**value, "schema": {"type": "string", "enum": NAMES[value["name"]]}}
    found = {name: named(each) for name, each in value.items()}
    if isinstance(properties := found.get("properties"), dict):
        found["properties"] = {
            name: {"type": "string", "enum": NAMES[name]} if name in NAMES else each
            for name, each in properties.items()
        }
    return found


def published() -> dict[str, Any]:
    """The published document, without the probe that answers 503 while no dyno runs."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    del found["paths"]["/ready"]
    return found


def document_for(role: Role) -> dict[str, Any]:
    """The document with `NAMES`, and the operations of producers or all others."""
    found = published()
    of_producers = {each.path for each in OPERATIONS if set(each.rights) & RIGHTS[Role.PRODUCER]}
    chosen = {path: each for path, each in found["paths"].items() if (path in of_producers) == (role is Role.PRODUCER)}
    parts = found["components"]["schemas"]
    # Answers stay as they are.
    parts |= {name: named(part) for name, part in parts.items() if name.endswith("Body") or name == "UsageEvent"}
    return found | {"paths": named(chosen)}


@pytest.mark.parametrize("role", [Role.PRODUCER, Role.OPERATOR])
@pytest.mark.timeout(RUN_SECONDS + 100)
def test_requests_of_the_document_get_answers_of_the_document(
    served: Served, settings: Settings, tmp_path: Path, role: Role
) -> None:
    give_accounts(settings, NAMES["user_id"], "basic")
    tried(served, tmp_path, document_for(role), role, "positive")


@pytest.mark.timeout(RUN_SECONDS + 100)
def test_other_requests_are_refused_as_the_document_says(served: Served, settings: Settings, tmp_path: Path) -> None:
    tried(served, tmp_path, published(), Role.OPERATOR, "negative")


def tried(served: Served, folder: Path, document: dict[str, Any], role: Role, mode: str) -> None:
    """Run schemathesis with a key of this role. It must find nothing, and have tried every operation."""
    (folder / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--mode", mode),
            *("--url", f"http://127.0.0.1:{served.port}", "--checks", ",".join(CHECKS)),
            *("--header", f"Authorization: Bearer {served.secrets[role]}"),
            *("--phases", "coverage,fuzzing", "--max-examples", "10", "--max-time", str(RUN_SECONDS)),
            *("--continue-on-failure", "--no-shrink", "--warnings", "off", "--suppress-health-check", "all"),
        ],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout[-20_000:] + done.stderr[-5_000:]
    assert done.returncode == 0, told
    assert re.findall(r"Tested: (\d+)", done.stdout) == [str(sum(map(len, document["paths"].values())))], told
