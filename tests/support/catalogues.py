"""Catalogue files for tests: the one that is shipped, and edited ones."""

from __future__ import annotations

from pathlib import Path

from config.catalogue import Catalogue, load_catalogue
from config.settings import DEFAULT_CATALOGUE

NEW_METER = "video_seconds"
# A meter and a price of a model that the shipped catalogue does not have.
_NEWER = [
    ("[meters.premium_voice]", f'[meters.{NEW_METER}]\nunit = "seconds"\n\n[meters.premium_voice]'),
    ("[plans.plus]", f"meters.{NEW_METER} = {{ quantity = 1_000_000 }}\n\n[plans.plus]"),
    ('m2 = "1.5"', 'm2 = "3"'),
]


def edited_catalogue(folder: Path, *edits: tuple[str, str], name: str = "edited.toml") -> Path:
    """Write the shipped catalogue with these replacements; return the file."""
    text = DEFAULT_CATALOGUE.read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def newer_catalogue(folder: Path) -> tuple[Path, Catalogue]:
    """Write a catalogue with a new meter, and with m2 at 3 instead of 1.5."""
    path = edited_catalogue(folder, *_NEWER, name="newer.toml")
    return path, load_catalogue(path)
