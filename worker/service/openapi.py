"""The OpenAPI document of the service, published as `schemas/openapi.json`: `python -m worker.service.openapi`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import schemas
from config.settings import Settings
from schemas.events import UsageEvent
from schemas.service import Problem
from worker.service import batches, cloudevents
from worker.service.app import make_app
from worker.service.problems import MEDIA_TYPE

FILE = Path(schemas.__file__).with_name("openapi.json")
_REF = "#/components/schemas/{model}"
# Models that no operation names to FastAPI: the form of every error, and bodies that the service parses by itself.
_MODELS: tuple[type[BaseModel], ...] = (Problem, UsageEvent)
_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "an API key; `meterfall api-keys add` makes one",
}


def document(app: FastAPI) -> dict[str, Any]:
    """Return the document of an application, with what FastAPI cannot know: keys, problems, and bodies of events."""
    found = app.openapi()
    _, definitions = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
    parts = found["components"]
    parts["schemas"] = dict(
        sorted({**parts["schemas"], **definitions["$defs"], "CloudEvent": dict(cloudevents.SCHEMA)}.items())
    )
    parts["securitySchemes"] = {"ApiKey": _SCHEME}
    parts["responses"] = {}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            if path.startswith("/v1/"):
                operation["security"] = [{"ApiKey": []}]
            # Each problem once, or they would be most of the document.
            for status, response in operation["responses"].items():
                if MEDIA_TYPE in response.get("content", {}):
                    parts["responses"].setdefault(f"Problem{status}", response)
                    operation["responses"][status] = {"$ref": f"#/components/responses/Problem{status}"}
    found["paths"]["/v1/events"]["post"]["requestBody"] = _body_of_events()
    return found


def _body_of_events() -> dict[str, Any]:
    event, cloud = ({"$ref": _REF.format(model=name)} for name in ("UsageEvent", "CloudEvent"))
    lines = {"type": "string", "description": "a usage event as JSON in each line"}
    return {
        "required": True,
        "content": {
            batches.JSON: {"schema": {"anyOf": [event, {"type": "array", "items": event, "minItems": 1}]}},
            **{media: {"schema": lines} for media in batches.LINES},
            batches.CLOUD_EVENT: {"schema": cloud},
            batches.CLOUD_EVENTS: {"schema": {"type": "array", "items": cloud, "minItems": 1}},
        },
    }


def exported() -> str:
    """Return the text of the published file. It depends on no setting."""
    settings = Settings(database_url="postgresql://127.0.0.1/unused")
    return json.dumps(document(make_app(settings)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file."""
    FILE.write_text(exported(), encoding="utf-8")


if __name__ == "__main__":
    main()
