"""The notes of producers before and after every call, so that a killed one leaves nothing unknown.

A producer appends lines to a file; a written line survives its process. A call begun and not confirmed is in doubt: the
successor of a killed producer makes it again, and identity decides.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.oracle import NOBODY, Accepted, Identity
from worker.demo.stage import Sponsored
from worker.keyspace.entries import owner_of

Line = Sequence[Any]


class Journal:
    """The file that a producer appends to; its threads share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, *line: Any) -> None:
        """Append one line, whole or not at all, by a single write in append mode."""
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


@dataclass
class Promised:
    """All journals read so far: confirmed calls, and calls still in doubt.

    Lines by their first word, each followed by its arguments:

    - `began` lane, number: a piece of work
    - `sending` user, event id, meter, quantity, multiplier, hold key; then `confirmed` user, event id, amount, or
      `denied` user, event id, reason
    - `spoiling` payload, reason; then `spoilt` payload, reason: a stream entry that must become a dead letter. A repeat
      of an unanswered one may become a second
    - `holding` user, meter, key; then `kept` user, meter, key, amount, if it is left open, or `ended` user, key
    - `asking` user, request, actual; then `served` and the fields of `Sponsored`
    - `paying` request, paid: a payment with its share for the pool, also confirmed by `served`
    - `granting` user, meter, key, amount; then `granted` user, meter, key
    - `again` what: a call was made again for lack of an answer
    - `did` what: a call without any trace in the books
    """

    began: dict[str, int] = field(default_factory=dict)
    events: dict[Identity, int] = field(default_factory=dict)
    sending: dict[Identity, Line] = field(default_factory=dict)
    spoilt_least: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    spoilt_most: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    holding: dict[Identity, Line] = field(default_factory=dict)
    kept: dict[Identity, Line] = field(default_factory=dict)
    asking: dict[str, Line] = field(default_factory=dict)
    paying: dict[str, int] = field(default_factory=dict)
    served: dict[str, Sponsored] = field(default_factory=dict)
    grants: dict[tuple[str, str, str], int] = field(default_factory=dict)
    granting: dict[tuple[str, str, str], int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, line: Line) -> None:
        """Add one line. Raises KeyError for one that does not follow from earlier lines."""
        getattr(self, f"_{line[0]}")(*line[1:])

    def doubts(self, lanes: Sequence[str]) -> dict[str, list[Any]]:
        """Return the calls in doubt for a successor of the producer of these lanes. Ids begin with a lane's name."""
        ours = tuple(f"{lane}-" for lane in lanes)
        return {
            "events": [line for line in self.sending.values() if line[1].startswith(ours)],
            "holds": [line for line in self.holding.values() if line[2].startswith(ours)],
            "requests": [line for line in self.asking.values() if line[1].startswith(ours)],
            "payments": [[name, paid] for name, paid in self.paying.items() if name.startswith(ours)],
            "grants": [[*name, amount] for name, amount in self.granting.items() if name[2].startswith(ours)],
        }

    def accepted(self, dead_letters: Counter[tuple[str, str, str]]) -> Accepted:
        """Return the facts that the oracle must find.

        Every attempt may make a dead letter; `dead_letters` counts the existing ones.
        """
        dead: Counter[tuple[str, str, str]] = Counter()
        for name, most in self.spoilt_most.items():
            dead[name] = min(max(dead_letters[name], self.spoilt_least[name]), most)
        holds = {(user_id, meter, key): amount for user_id, meter, key, amount in self.kept.values()}
        grants = {request: sponsored.absorbed for request, sponsored in self.served.items()}
        promises = {
            request: sponsored.held for request, sponsored in self.served.items() if sponsored.ended == "left open"
        }
        return Accepted(self.events, +dead, holds, grants, promises)

    def _began(self, lane: str, number: int) -> None:
        self.began[lane] = number

    def _sending(self, user_id: str, event_id: str, *rest: Any) -> None:
        if (user_id, event_id) in self.events or (user_id, event_id) in self.sending:
            self.counts["sent again"] += 1
        self.sending[user_id, event_id] = [user_id, event_id, *rest]

    def _confirmed(self, user_id: str, event_id: str, amount: int) -> None:
        *_, hold_key = self.sending.pop((user_id, event_id))
        self.events[user_id, event_id] = amount
        if hold_key is not None:
            self._ended(user_id, hold_key)

    def _denied(self, user_id: str, event_id: str, reason: str) -> None:
        del self.sending[user_id, event_id]
        self.counts[f"denied: {reason}"] += 1

    def _spoiling(self, payload: str, reason: str) -> None:
        self.spoilt_most[_owner(payload, reason)] += 1

    def _spoilt(self, payload: str, reason: str) -> None:
        self.spoilt_least[_owner(payload, reason)] += 1
        self.counts["malformed stream entries"] += 1

    def _holding(self, user_id: str, meter: str, key: str) -> None:
        self.holding[user_id, key] = [user_id, meter, key]

    def _kept(self, user_id: str, meter: str, key: str, amount: int) -> None:
        del self.holding[user_id, key]
        self.kept[user_id, key] = [user_id, meter, key, amount]

    def _ended(self, user_id: str, key: str) -> None:
        self.holding.pop((user_id, key), None)
        self.kept.pop((user_id, key), None)

    def _asking(self, user_id: str, request_id: str, actual: int) -> None:
        self.asking[request_id] = [user_id, request_id, actual]

    def _paying(self, request_id: str, paid: int) -> None:
        self.paying[request_id] = paid

    def _served(self, *fields: Any) -> None:
        sponsored = Sponsored(*fields)
        self.asking.pop(sponsored.request_id, None)
        self.paying.pop(sponsored.request_id, None)
        self.served[sponsored.request_id] = sponsored

    def _granting(self, user_id: str, meter: str, key: str, amount: int) -> None:
        self.granting[user_id, meter, key] = amount

    def _granted(self, user_id: str, meter: str, key: str) -> None:
        self.grants[user_id, meter, key] = self.granting.pop((user_id, meter, key))

    def _again(self, what: str) -> None:
        self.counts[f"again: {what}"] += 1

    def _did(self, what: str) -> None:
        self.counts[what] += 1


class Reader:
    """The reader of a journal: adds the lines appended since its last look."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""

    def read_into(self, promised: Promised) -> None:
        """Add all new whole lines."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            promised.take(json.loads(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _owner(payload: str, reason: str) -> tuple[str, str, str]:
    """Return the identity under which the oracle counts a dead letter."""
    owner = owner_of(payload.encode())
    return (owner[0], owner[2], reason) if owner else (*NOBODY, reason)
