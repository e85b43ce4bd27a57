"""The AsyncAPI document of messages, published as `schemas/asyncapi.json`: `python -m worker.service.asyncapi`.

It describes what meterfall receives (the entries of its streams) and what it sends by itself (notices to webhooks).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

import schemas
from schemas.events import StreamEntry, UsageEvent
from schemas.notices import Notice
from worker.keyspace.keys import Partition

FILE = Path(schemas.__file__).with_name("asyncapi.json")
_REF = "#/components/schemas/{model}"
_WEBHOOK_HEADERS = {
    "webhook-id": "the id of the notice; the same again if it is sent again",
    "webhook-timestamp": "when this try was made, in seconds since 1970",
    "webhook-signature": "signatures as Standard Webhooks says, one for each secret in use",
}


def document() -> dict[str, Any]:
    """Return the document."""
    _, received = models_json_schema([(StreamEntry, "validation"), (UsageEvent, "validation")], ref_template=_REF)
    _, sent = models_json_schema([(Notice, "serialization")], ref_template=_REF)
    models = dict(sorted({**received["$defs"], **sent["$defs"]}.items()))
    models["StreamEntry"]["properties"]["e"] |= {
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": _REF.format(model="UsageEvent")},
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "meterfall",
            "version": "1",
            "description": "Usage events that services append to streams of Redis, and notices that meterfall sends. "
            "The version is that of the wire format, `v` of a stream entry.",
        },
        "servers": {
            "redis": {
                "host": "127.0.0.1:6379",
                "protocol": "redis",
                "description": "the Redis or Valkey that REDIS_URL names",
            }
        },
        "channels": {"usage": _usage(), "webhook": _webhook()},
        "operations": {
            "receiveUsage": {
                "action": "receive",
                "channel": {"$ref": "#/channels/usage"},
                "summary": "Take each event from its user's balances, once for each user and event id.",
                "description": "Append with `XADD KEY * v 1 e EVENT`. An entry that cannot be read becomes a dead "
                "letter; nothing is lost.",
            },
            "sendNotice": {
                "action": "send",
                "channel": {"$ref": "#/channels/webhook"},
                "summary": "Tell what happened to an account, at least once, in the order of the account.",
                "description": "Any answer 2xx takes it; everything else is tried again.",
            },
        },
        "components": {
            "messages": {
                "StreamEntry": {
                    "title": "Entry of a stream",
                    "summary": "The fields of one XADD; `e` is a usage event as JSON.",
                    "payload": {"$ref": _REF.format(model="StreamEntry")},
                    "examples": [{"payload": {"v": "1", "e": _EXAMPLE}}],
                },
                "Notice": {
                    "title": "Notice",
                    "contentType": "application/json",
                    "headers": {
                        "type": "object",
                        "properties": {
                            name: {"type": "string", "description": text} for name, text in _WEBHOOK_HEADERS.items()
                        },
                        "required": list(_WEBHOOK_HEADERS),
                    },
                    "payload": {"$ref": _REF.format(model="Notice")},
                },
            },
            "schemas": models,
        },
    }


_EXAMPLE = json.dumps(
    {"event_id": "job-7f3", "user_id": "user-42", "meter": "premium_voice", "quantity": 1840, "multiplier": "1.5"}
)


def _usage() -> dict[str, Any]:
    return {
        "address": Partition(0).entries.replace("{p0}", "{stream}"),
        "title": "Streams of usage events",
        "description": "All events of a user go to one stream. Its number is the CRC-32 (of ISO-HDLC, as zlib "
        "computes it) of the user id in UTF-8, modulo METERFALL_PARTITIONS (8).",
        "servers": [{"$ref": "#/servers/redis"}],
        "parameters": {
            "stream": {
                "description": "`{p<number>}` with the braces: a hash tag, which keeps the keys of a stream together",
                "examples": ["{p0}", "{p3}"],
            }
        },
        "messages": {"entry": {"$ref": "#/components/messages/StreamEntry"}},
        "bindings": {"redis": {}},
    }


def _webhook() -> dict[str, Any]:
    return {
        "address": None,
        "title": "A webhook",
        "description": "A POST to each address that `meterfall webhooks add` named.",
        "messages": {"notice": {"$ref": "#/components/messages/Notice"}},
    }


def exported() -> str:
    """Return the text of the published file."""
    return json.dumps(document(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file."""
    FILE.write_text(exported(), encoding="utf-8")


if __name__ == "__main__":
    main()
