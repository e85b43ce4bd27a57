"""The status for people: a verdict, the totals, then only what is remarkable. It fits 80 columns and 25 lines."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator

from schemas.status import Status
from worker.reports.health import supervisors, worker_processes
from worker.reports.status import MOST_UNCOLLECTED
from worker.rules import formats
from worker.rules.words import counted

WIDTH, LINES = 80, 25
# Of each finding at most so many lines, so that one long error does not hide the others.
_LINES_OF_A_FINDING = 3


def status_lines(status: Status) -> list[str]:
    """Return the lines that show a status."""
    lines = [_shortened(_verdict(status)), *_totals(status)]
    findings = [list(_wrapped(f"! {one.text.rstrip('.')}. {_sentence(one.remedy)}")) for one in status.findings]
    notes = [list(_wrapped(f"- {note}")) for note in _notes(status)]
    left = len(findings) + len(notes)
    for block in [*findings, *notes]:
        needed = len(block) + (1 if left > 1 else 0)
        if len(lines) + needed > LINES:
            break
        lines += block
        left -= 1
    if left:
        lines.append(f"… and {left} more; `meterfall health` lists every failed check")
    return lines


def _verdict(status: Status) -> str:
    word = status.severity.upper()
    if not status.findings:
        return f"{word}  {formats.moment(status.at)}"
    first, *others = status.findings
    more = f" (and {len(others)} more)" if others else ""
    return f"{word}: {first.text}{more}"


def _totals(status: Status) -> Iterator[str]:
    yield f"at        {formats.moment(status.at)}"
    if status.lag is not None:
        oldest = f", the oldest {formats.age((status.oldest_age_ms or 0) / 1_000)} old" if status.lag else ""
        yield f"waiting   {counted(status.lag, 'stream entry')}{oldest}"
        yield f"billed    {formats.rate(status.per_second or 0)} in the last 10 s{_empty_in(status)}"
        jobs = f"{status.waiting_jobs:,} jobs wait" if status.waiting_jobs is not None else "no queue"
        yield f"pending   {formats.grouped(status.pending or 0)} holds and events, {jobs}"
    if status.dynos:
        yield _shortened(f"dynos     {_dynos(status)}")
    if status.accounts is not None:
        yield f"ledger    {counted(status.accounts, 'account')}, {_letters(status)}"
    if status.redis.used_memory_bytes is not None:
        bound = f" of {formats.memory(status.redis.maxmemory_bytes)}" if status.redis.maxmemory_bytes else ""
        yield f"redis     {status.redis.version}, {formats.memory(status.redis.used_memory_bytes)}{bound}"
    if status.redis.answers:
        yield f"proof     {_proof(status)}"


def _empty_in(status: Status) -> str:
    if not status.lag or status.seconds_to_empty is None:
        return ""
    return f", at this rate empty in {formats.age(status.seconds_to_empty)}"


def _dynos(status: Status) -> str:
    releases = sorted({one.release for one in status.dynos or ()})
    named = f"release{'s' if len(releases) > 1 else ''} {', '.join(releases)}"
    workers = counted(len(worker_processes(status)), "worker process")
    return f"{counted(len(supervisors(status)), 'dyno')}, {workers}, {named}"


def _letters(status: Status) -> str:
    if not status.dead_by_reason:
        return "no open dead letters"
    return f"open dead letters {formats.grouped(status.dead_letters or 0)}"


def _proof(status: Status) -> str:
    proof = status.proof
    if proof is None:
        return "none yet"
    ago = formats.age((status.at - proof.finished_at).total_seconds())
    found = counted(proof.differences, "difference") if proof.differences else "clean"
    return f"{found}, {ago} ago: {counted(proof.accounts, 'account')}, {counted(proof.changes, 'change')}"


def _notes(status: Status) -> Iterator[str]:
    """Yield what is worth a look, but no failure."""
    if status.dead_by_reason:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in list(status.dead_by_reason.items())[:4])
        rest = len(status.dead_by_reason) - 4
        others = f" and {counted(rest, 'other reason')}" if rest > 0 else ""
        yield f"open dead letters: {reasons}{others}; `meterfall dead list --reason …` shows them"
    of_release = Counter(one.release for one in status.dynos or ())
    if len(of_release) > 1:
        yield "processes of several releases: " + ", ".join(f"{name} in {n}" for name, n in sorted(of_release.items()))
    of_catalogue = Counter(one.catalogue for one in status.dynos or () if one.catalogue != status.catalogue)
    for digest, processes in sorted(of_catalogue.items()):
        yield f"catalogue {digest} is in {counted(processes, 'process')}; {status.catalogue} is in force"
    if status.late_repeats:
        yield (
            f"{counted(status.late_repeats, 'event')} came again within a day, after the outcome was forgotten, and "
            "not billed again: a producer retries for long, or uses a key twice; `meterfall explain` shows each"
        )
    if status.uncollected:
        most = [f"{one.meter} {counted(one.events, 'event')}, {one.amount:,} units" for one in status.uncollected[:3]]
        rest = len(status.uncollected) - len(most)
        others = f"; and {counted(rest, 'other meter')}" if rest else ""
        least = "at least " if sum(one.events for one in status.uncollected) >= MOST_UNCOLLECTED else ""
        yield (
            f"in a day no account paid {least}{'; '.join(most)}{others}: `meterfall report uncollected` names the "
            "users; open accounts for them, or mend the service that serves them"
        )
    if status.notices is not None and status.notices.webhooks:
        waits = formats.grouped(status.notices.waiting)
        yield f"notices: {waits} wait for {counted(status.notices.webhooks, 'webhook')}"
    if status.spooled:
        ago = formats.age(status.spooled_oldest_age_ms / 1_000)
        yield f"spooled on this machine {formats.grouped(status.spooled)}, the oldest {ago} ago"
    busy = sorted((one for one in status.partitions if one.lag), key=lambda one: -one.lag)[:3]
    if busy:
        yield "most wait in " + ", ".join(f"partition {one.partition}: {one.lag:,}" for one in busy)


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=True, break_on_hyphens=False)
    if len(lines) <= _LINES_OF_A_FINDING:
        return lines
    kept, rest = lines[: _LINES_OF_A_FINDING - 1], lines[_LINES_OF_A_FINDING - 1 :]
    return [*kept, _shortened("  " + " ".join(" ".join(rest).split()))]


def _shortened(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
