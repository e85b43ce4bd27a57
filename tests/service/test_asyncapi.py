"""The published AsyncAPI document: current, whole, true of the wire; and valid, where this machine has Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from config.settings import Settings
from schemas.export import exported as exported_schemas
from tests.support.ledger import give_account, rows
from tests.support.resources import settings_for
from tests.support.streams import drain, partition_of
from worker.service.asyncapi import FILE, exported

DOCUMENT = json.loads(FILE.read_text(encoding="utf-8"))
_PARSE = """
import parser from "@asyncapi/parser";
import { readFileSync } from "node:fs";
const { document, diagnostics } = await new parser.Parser().parse(readFileSync(process.argv[2], "utf8"));
const faults = diagnostics.filter((each) => each.severity < 2 && each.code !== "asyncapi-latest-version");
console.log(JSON.stringify({ valid: document !== undefined, faults: faults.map((each) => each.message) }));
"""


def test_the_published_document_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == exported(), "run: python -m worker.service.asyncapi"


@pytest.mark.parametrize(
    ("model", "file"), [("StreamEntry", "stream_entry"), ("UsageEvent", "usage_event"), ("Notice", "notice")]
)
def test_its_messages_are_the_published_schemas(model: str, file: str) -> None:
    found, alone = DOCUMENT["components"]["schemas"][model], json.loads(exported_schemas()[f"{file}.schema.json"])
    assert found["required"] == alone["required"]
    assert found["properties"].keys() == alone["properties"].keys()


def test_an_entry_as_it_says_is_charged(emptied_database_url: str, redis_url: str) -> None:
    settings: Settings = settings_for(emptied_database_url, redis_url)
    (example,) = DOCUMENT["components"]["messages"]["StreamEntry"]["examples"]
    event: dict[str, Any] = json.loads(example["payload"]["e"])
    give_account(settings, event["user_id"], "basic")
    channel = DOCUMENT["channels"]["usage"]
    stream = f"{{p{partition_of(settings, event['user_id']).number}}}"
    assert stream in channel["parameters"]["stream"]["examples"]
    with Redis.from_url(redis_url) as redis:
        redis.xadd(channel["address"].replace("{stream}", stream), example["payload"])
    drain(settings, event["user_id"])
    charged = rows(settings, "SELECT event_id, amount FROM usage_log")
    assert charged == [(event["event_id"], 2_760)]


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_it_is_valid(tmp_path: Path) -> None:
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "@asyncapi/parser@^3.6"]
    subprocess.run(install, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=180)
    (tmp_path / "parse.mjs").write_text(_PARSE, encoding="utf-8")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**DOCUMENT, "channels": {"usage": {"messages": 1}}}), encoding="utf-8")
    said = []
    for file in (FILE, wrong):
        parse = ["node", "parse.mjs", str(file)]
        done = subprocess.run(parse, cwd=tmp_path, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        said.append(json.loads(done.stdout))
    assert said[0] == {"valid": True, "faults": []}
    assert not said[1]["valid"], "the parser finds faults"
