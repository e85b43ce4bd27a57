"""Make the small pictures of the console for the README: `python docs/screenshots.py`.

`make test` leaves pictures of every page in `out/console/`; this takes the upper part of three of them, scales it down
and limits its colours, so that each is a few kilobytes.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "out" / "console"
PAGES = ("overview", "account", "catalogue")
SIZE = (600, 480)
COLOURS = 48


def small(shot: Image.Image) -> Image.Image:
    """Return the upper part of a picture of a page, small and in few colours."""
    width, height = SIZE
    upper = shot.convert("RGB").crop((0, 0, shot.width, shot.width * height // width))
    return upper.resize(SIZE, Image.Resampling.LANCZOS).quantize(COLOURS)


def main() -> None:
    """Write `docs/console-<page>.png` for each page."""
    for name in PAGES:
        with Image.open(SHOTS / f"{name}.png") as shot:
            small(shot).save(ROOT / "docs" / f"console-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
