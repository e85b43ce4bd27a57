"""`RateLimit` headers: what an answer of a check says is left, in the form of the IETF draft.

    RateLimit-Policy: "premium_voice";q=100000
    RateLimit: "premium_voice";r=98160

`q` is the limit of the period, or of the day, week or month that denied, and `w` its length in seconds. `r` are the
units available now, `t` the seconds until the limit that denied ends. Unlimited usage has no headers.
"""

from __future__ import annotations

from datetime import UTC, datetime

from schemas.answers import CheckAnswer

_WINDOW_SECONDS = {"day": 86_400, "week": 7 * 86_400}


def limit_headers(answer: CheckAnswer, now: datetime | None = None) -> dict[str, str]:
    """Return the headers for the answer of a check, whether it allowed or denied; `now` is the time of the answer."""
    if answer.available is None:
        return {}
    name = answer.meter if answer.backend is None or answer.cap is None else f"{answer.meter}/{answer.backend}"
    left = f'"{name}";r={max(0, answer.available)}'
    by = answer.limited_by
    if by is not None:
        seconds = max(0, round((by.ends_at - (now or datetime.now(UTC))).total_seconds()))
        window = f";w={_WINDOW_SECONDS[by.per]}" if by.per in _WINDOW_SECONDS else ""
        return {"RateLimit-Policy": f'"{name}";q={by.amount}{window}', "RateLimit": f"{left};t={seconds}"}
    # The limit of a wallet is in units of the wallet, what is available in those of the meter.
    if answer.limit is None or answer.wallet is not None:
        return {"RateLimit": left}
    limit = answer.limit if answer.cap is None else min(answer.limit, answer.cap)
    return {"RateLimit-Policy": f'"{name}";q={limit}', "RateLimit": left}
