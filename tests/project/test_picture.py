"""The picture of the README is what its script draws of a demo run, and every reader can see it or have it read out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from docs.picture import PICTURE, ROOT, PictureError, drawn, figures
from worker.version import read_version

SVG = "{http://www.w3.org/2000/svg}"
# Wider than the average character of common fonts: a picture that passes with it clips no text.
EMS_PER_CHARACTER = 0.6
FONT_SIZES = {"head": 17, "number": 24}


def run_of(**changed: Any) -> dict[str, Any]:
    """The report of a small demo run, with some of its fields changed."""
    buckets = ("from_subscription", "from_rollover", "from_purchased", "overflow_to_debt")
    usage: list[dict[str, Any]] = [
        {"plan": "free", "meter": "ocr_tokens", "amount": 749, **dict(zip(buckets, (700, 40, 0, 9), strict=True))},
        {"plan": "max", "meter": "premium_voice", "amount": 5_000, **dict(zip(buckets, (5_000, 0, 0, 0), strict=True))},
    ]
    report = {
        "postgres": "PostgreSQL 15.2 <from> DATABASE_URL",
        "redis": "Redis 7.0.15 & more",
        "seed": 1,
        "operations": 20,
        "entries": 16,
        "recorded": 12,
        "repeated": 1,
        "dead_letters": {"not_json": 2, "too_old": 1},
        "denied": {"limit_exceeded": 5},
        "verified_accounts": 2,
        "verified_changes": 14,
        "usage": usage,
        "faults": [],
    }
    return report | changed


def texts_of(svg: str) -> list[str]:
    """Every line of text in a picture."""
    return [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_script_draws_the_numbers_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "demo.svg"
    command = [sys.executable, str(ROOT / "docs/picture.py"), "-", "--day", "2026-11-29", "--out", str(path)]
    done = subprocess.run(command, input=json.dumps(run_of()), capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{path}\n"
    texts = texts_of(path.read_text(encoding="utf-8"))
    for shown in ("16", "=", "12", "+", "1", "3", "free · ocr_tokens", "700", "40", "9"):
        assert shown in texts
    assert "max · premium_voice" not in texts  # subscription paid all of it
    assert "5 checks said no before the work began." in texts
    assert "The proof replayed 14 changes of 2 accounts: 0 differences." in texts
    assert f"2026-11-29, meterfall {read_version()}, PostgreSQL 15.2, Redis 7.0.15" in texts


def test_a_run_that_cannot_be_shown_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "demo.svg"
    command = [sys.executable, str(ROOT / "docs/picture.py"), "-", "--out", str(path)]
    fault = "1 × recorded but never sent"
    wrong = {
        json.dumps(run_of(faults=[fault])): f"the run found a fault: {fault}",
        json.dumps(["no", "report"]): "not a report of `meterfall demo --json`",
        "meterfall: nothing": "not JSON: Expecting value: line 1 column 1 (char 0)",
    }
    for text, reason in wrong.items():
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (1, f"picture: {reason}\n")
    assert not path.exists()


def test_numbers_that_do_not_add_up_are_not_drawn() -> None:
    with pytest.raises(PictureError, match="entries are not events, repeats and dead letters"):
        figures(run_of(entries=17), "1.0", "2026-11-29")
    usage = [run_of()["usage"][0] | {"amount": 750}]
    with pytest.raises(PictureError, match="free ocr_tokens: the buckets do not sum to the amount"):
        figures(run_of(usage=usage), "1.0", "2026-11-29")
    with pytest.raises(PictureError, match="the report has no 'postgres'"):
        figures({"replayed": 3}, "1.0", "2026-11-29")


def test_the_readme_shows_a_picture_drawn_by_this_script_from_the_numbers_it_carries() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({PICTURE.relative_to(ROOT)})" in readme
    svg = PICTURE.read_text(encoding="utf-8")
    carried = ET.fromstring(svg).findtext(f"{SVG}metadata")
    assert carried is not None
    assert drawn(json.loads(carried)) == svg
    assert json.loads(carried)["operations"] >= 20_000


def test_the_picture_needs_no_other_file_and_can_be_read_out() -> None:
    svg = PICTURE.read_text(encoding="utf-8")
    picture = ET.fromstring(svg)
    assert {part.tag.removeprefix(SVG) for part in picture.iter()} == {
        "svg", "title", "desc", "metadata", "style", "rect", "text"
    }  # fmt: skip
    assert "url(" not in svg
    assert "@import" not in svg
    assert svg.count("http") == 1  # the namespace
    for part, label in zip(("title", "desc"), picture.attrib["aria-labelledby"].split(), strict=True):
        found = picture.find(f"{SVG}{part}")
        assert found is not None
        assert found.get("id") == label
        assert found.text


def test_no_text_of_the_picture_is_clipped_or_lies_upon_another() -> None:
    picture = ET.fromstring(PICTURE.read_text(encoding="utf-8"))
    _, _, width, height = map(int, picture.attrib["viewBox"].split())
    areas: dict[tuple[float, float, float, float], str] = {}
    for text in picture.iter(f"{SVG}text"):
        words, size = text.text or "", FONT_SIZES.get(text.get("class", ""), 13)
        length = len(words) * size * EMS_PER_CHARACTER
        left = int(text.attrib["x"]) - length * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor", "start")]
        bottom = int(text.attrib["y"]) + size * 0.2
        area = (left, bottom - size, left + length, bottom)
        assert 0 <= area[0] < area[2] <= width, words
        assert 0 <= area[1] < area[3] <= height, words
        for other, others in areas.items():
            apart = area[2] < other[0] or other[2] < area[0] or area[3] < other[1] or other[3] < area[1]
            assert apart, f"{words!r} upon {others!r}"
        areas[area] = words
