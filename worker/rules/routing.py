"""The backend for a request: by preference, by the units left, and by configuration. Pure rules, no I/O.

The golden cases are tests/vectors/routing.json.
"""

from __future__ import annotations

from typing import NamedTuple

GEMINI, HARDWARE = "gemini", "hardware"

# Per preference: the backends to try, in order, and the reason for a refusal if none can do it.
_RULES: dict[str, tuple[tuple[str, ...], str]] = {
    "gemini_first": ((GEMINI, HARDWARE), "gemini_cap_exceeded_no_hardware"),
    "hardware_first": ((HARDWARE, GEMINI), "no_backend_available"),
    "gemini_only": ((GEMINI,), "gemini_cap_exceeded_no_fallback"),
    "hardware_only": ((HARDWARE,), "hardware_only_not_configured"),
}
PREFERENCES = tuple(_RULES)


class Decision(NamedTuple):
    """The backend to use, or the reason for none."""

    allowed: bool
    backend: str | None
    reason: str | None


def plan_backend(remaining: int | None, sub_remaining: int | None, has_hardware: bool, preference: str) -> Decision:
    """Return the backend for a request, or the reason for none.

    `remaining` units are left, `sub_remaining` of them for gemini; None = unlimited. `has_hardware`: the host has
    machines of its own.
    Raises ValueError for a preference not among `PREFERENCES`.
    """
    if preference not in _RULES:
        raise ValueError(f"preference: must be one of {', '.join(PREFERENCES)} (got {preference[:64]!r})")
    if remaining is not None and remaining <= 0:
        return Decision(allowed=False, backend=None, reason="out_of_credits")
    usable = {GEMINI: sub_remaining is None or sub_remaining > 0, HARDWARE: has_hardware}
    backends, otherwise = _RULES[preference]
    chosen = next((backend for backend in backends if usable[backend]), None)
    return Decision(chosen is not None, chosen, otherwise if chosen is None else None)
