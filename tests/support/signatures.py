"""Keys of producers, and signatures that are worked out without our code."""

from __future__ import annotations

import hashlib
import hmac

SECRETS = {"tts": "t" * 32, "ocr": "o" * 31 + "=", "old": "p" * 40}
ENDED = "2026-11-20T12:00:00Z"
KEYS = f"tts={SECRETS['tts']}, ocr={SECRETS['ocr']}\nold={SECRETS['old']}@{ENDED}"


def signature(data: bytes, key_id: str = "tts", secret: str | None = None) -> bytes:
    """What a producer makes of a payload, worked out without our code."""
    digest = hmac.new((secret or SECRETS[key_id]).encode(), data, hashlib.sha256).hexdigest()
    return f"{key_id}:{digest}".encode()
