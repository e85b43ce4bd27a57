"""What a proof finds wrong with an account."""

from __future__ import annotations

from typing import NamedTuple

from schemas.status import Difference


class Wrong(NamedTuple):
    """One way in which an account differs, in words, with what its changes make it and what it is."""

    text: str
    kind: str
    meter: str | None = None
    expected: object = None
    found: object = None

    def of(self, user_id: str | None, prefix: str) -> Difference:
        """Return it as the difference of an account, None for all of them; `user_id` and `prefix` name it."""
        return Difference(
            user_id=user_id, meter=self.meter, kind=self.kind, text=f"{prefix}: {self.text}",
            expected=None if self.expected is None else str(self.expected),
            found=None if self.found is None else str(self.found),
        )  # fmt: skip
