"""docs/http.md does what it says: every command and answer, on a running service, and its table of paths."""

from __future__ import annotations

import os
import re
from pathlib import Path

from config.settings import Settings
from tests.support.console import Shell, blocks_of
from tests.support.paths import ROOT
from tests.support.serving import Served
from tests.support.streams import drain
from worker.service.access import OPERATIONS

GUIDE = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


def test_the_guide_does_what_it_says(served: Served, settings: Settings, tmp_path: Path) -> None:
    assert settings.database_url is not None
    shell = Shell(tmp_path, {**os.environ, "DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url})
    shell.export({"KEY": served.secrets["producer"], "OPERATOR": served.secrets["operator"]})
    commands = [text for language, text in blocks_of(GUIDE) if language == "console"]
    assert len(commands) > 8
    for text in commands:
        assert shell.run(text.replace("127.0.0.1:8080", f"127.0.0.1:{served.port}")) == []
        drain(settings, "user-42")


def test_its_table_has_every_path_with_its_rights() -> None:
    told = re.findall(r"^\| `(GET|POST) (/v1/[a-z/-]+)` \| .* \| (.*) \|$", GUIDE, re.MULTILINE)
    assert told == [
        (each.method, each.path, ", ".join(f"`{right.value}`" for right in each.rights)) for each in OPERATIONS
    ]
