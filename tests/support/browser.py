"""Chromium, driven by Playwright, for tests in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright


def chromium_binary() -> str:
    """The program; skips the test where this machine has none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser of this machine until the end of the block."""
    # Root has no sandbox of namespaces; pages here are our own.
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_binary(), args=options)
        try:
            yield browser
        finally:
            browser.close()
