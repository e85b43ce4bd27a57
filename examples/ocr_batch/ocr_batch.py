"""Read a document of many pages, billed page by page. README.md says how to run it, and again after a crash.

python ocr_batch.py user-42 scan-7 pages/ texts/
"""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path

from meterfall import Billing, Hold, HoldClosed, HoldConflict, RedisUnavailable

METER = "ocr_tokens"
TOKENS_PER_PAGE = 100  # an estimate, for the hold only
HOLD_SECONDS = 3_600


def main(user_id: str, document_id: str, source: Path, target: Path) -> None:
    """Read every page that has no text yet, and bill every page: the ones billed before are not billed again."""
    pages = sorted(source.iterdir())
    missing = [page for page in pages if not (target / page.name).exists()]
    with Billing.connect() as billing:
        hold = open_hold(billing, user_id, document_id, TOKENS_PER_PAGE * len(missing))
        for index, page in enumerate(pages):
            text = kept_text(page, target)
            capture(hold, document_id, index, len(text.split()))
            print(f"page {index}", flush=True)
        hold.release()  # the estimate was too high


def open_hold(billing: Billing, user_id: str, document_id: str, tokens: int) -> Hold:
    """Return the hold that a killed run left, while it is open; otherwise a new one under the next key."""
    for attempt in count(1):
        key = f"{document_id}-{attempt}"
        try:
            return billing.reserve(user_id, METER, tokens, key, HOLD_SECONDS)
        except HoldConflict as held:
            return billing.reserve(user_id, METER, held.amount, key, HOLD_SECONDS)
        except HoldClosed:
            continue
    raise AssertionError("unreachable")


def kept_text(page: Path, target: Path) -> str:
    """Return the text of a page. It is on disk before it is billed: a second reading might count other tokens."""
    kept = target / page.name
    if not kept.exists():
        unfinished = kept.with_suffix(".part")
        unfinished.write_text(recognise(page), encoding="utf-8")
        unfinished.replace(kept)
    return kept.read_text(encoding="utf-8")


def recognise(page: Path) -> str:
    """Stand in for an engine."""
    time.sleep(0.002)
    return page.read_text(encoding="utf-8")


def capture(hold: Hold, document_id: str, index: int, tokens: int) -> None:
    """Bill one page; wait for Redis if it is away. The id makes a repeat harmless."""
    while True:
        try:
            hold.capture(
                f"{document_id}-page-{index}", tokens, dimensions={"document_id": document_id, "page_idx": index}
            )
        except RedisUnavailable as error:
            print(error, file=sys.stderr)
            time.sleep(0.2)
        else:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
