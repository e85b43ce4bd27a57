"""The version of this code."""

from __future__ import annotations

import tomllib
from pathlib import Path

DISTRIBUTION = "meterfall"
UNKNOWN = "unknown"


def read_version() -> str:
    """Read the version of this code from its tree, else from its installation.

    A platform runs a tree that is not installed, and an installation that points to a tree may be older than the tree.
    Returns `unknown` for files that were copied without either.
    """
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        about = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if about.get("name") == DISTRIBUTION:
            return str(about["version"])
    from importlib import metadata  # takes longer to import than all the rest of a command

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return UNKNOWN
