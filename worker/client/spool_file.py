"""The spool: calls that Redis has not confirmed, on this machine's disk, in their order.

It is one SQLite file in a folder that any number of processes and threads may share. It exists only while it has items,
so a look costs next to nothing. It uses a rollback journal, not a write-ahead log: that may lose pages if several
processes write, in every SQLite before 3.51.3. Each method opens the file anew, so a fork inherits none of it, but for
a lock between threads: a child makes a `Spool` of its own. When `keep` returns, all its items are on disk. A process
that dies half-way leaves a journal, and the next one that opens the file undoes that half.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import IO, Self

from worker.client.spool_items import Item, Kept
from worker.errors import SpoolUnavailable

# Longest wait for another process's write, which takes milliseconds.
_BUSY_SECONDS = 5.0

# No id is used twice: a process that is slow to forget sent items must not forget later ones.
_TABLE = """
    CREATE TABLE IF NOT EXISTS kept (
        id INTEGER PRIMARY KEY AUTOINCREMENT, kept_at REAL NOT NULL, kind TEXT NOT NULL, content TEXT NOT NULL,
        captured_from TEXT, traceparent TEXT
    )
"""
# A file of an earlier release has no traces.
_HAS_TRACES = "SELECT EXISTS (SELECT 1 FROM pragma_table_info('kept') WHERE name = 'traceparent')"
_ADD_TRACES = "ALTER TABLE kept ADD COLUMN traceparent TEXT"
_KEEP = "INSERT INTO kept (kept_at, kind, content, captured_from, traceparent) VALUES (?, ?, ?, ?, ?)"
_OLDEST = "SELECT id, kept_at, kind, content, captured_from, traceparent FROM kept ORDER BY id LIMIT ?"
_COUNT = "SELECT count(*), min(kept_at) FROM kept"
# One look at each end, however many there are.
_SPAN = "SELECT (SELECT max(id) FROM kept) - (SELECT min(id) FROM kept) + 1"
_ANY = "SELECT EXISTS (SELECT 1 FROM kept)"
_FORGET = "DELETE FROM kept WHERE id = ?"


class Spool:
    """The spool in one folder. All methods raise SpoolUnavailable if they cannot read or write the file."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Touch no file yet; the first `keep` makes folder and file."""
        self._path = folder / "spool.sqlite3"
        self._max_bytes = max_bytes
        # SQLite looks for a free file ever more rarely: a thread that keeps one item after the other would keep the one
        # that forgets what is sent waiting for seconds.
        self._writing = Lock()

    def keep(self, items: Iterable[Item]) -> None:
        """Append items, all or none. They are on disk when it returns; if killed before, all or none are there."""
        now = time.time()
        self._write(_KEEP, [(now, *item) for item in items], self._max_bytes)

    def has_no_file(self) -> bool:
        """True when nothing is kept, and no empty file is left. Reads nothing."""
        return not self._path.exists()

    def is_empty(self) -> bool:
        """Return True if there are no items. Deletes a file that has become empty."""
        return not self.length()

    def length(self) -> int:
        """Return the number of items, or a little more: 0 only when there are none. Deletes a file without any."""
        if not self._path.exists():
            return 0
        with self._open() as database:
            (length,) = database.execute(_SPAN).fetchone()
        if length is None:
            self._delete_empty()
        return length or 0

    def oldest(self, limit: int) -> list[Kept]:
        """Return the oldest items, at most `limit`."""
        if not self._path.exists():
            return []
        with self._open() as database:
            rows = database.execute(_OLDEST, (limit,)).fetchall()
        return [Kept(row[0], datetime.fromtimestamp(row[1], UTC), Item(*row[2:])) for row in rows]

    def forget(self, ids: Sequence[int]) -> None:
        """Delete items that Redis has confirmed. If killed before it returns, they may be sent again."""
        if ids:
            self._write(_FORGET, [(each,) for each in ids])

    def count(self) -> tuple[int, datetime | None]:
        """Return the number of items, and the time of the oldest."""
        if not self._path.exists():
            return 0, None
        with self._open() as database:
            count, oldest = database.execute(_COUNT).fetchone()
        return count, None if oldest is None else datetime.fromtimestamp(oldest, UTC)

    def take_turn(self) -> SendingTurn | None:
        """Take the right to send, until the returned file is closed or the process dies. None: another has it."""
        try:
            turn = self._path.with_suffix(".sending").open("ab")
        except OSError as error:
            raise SpoolUnavailable(str(self._path), str(error)) from error
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            turn.close()
            if isinstance(error, BlockingIOError):
                return None
            raise SpoolUnavailable(str(self._path), str(error)) from error
        return SendingTurn(turn)

    def _delete_empty(self) -> None:
        """Delete the file unless a process has it open or has kept items meanwhile; an empty file does no harm."""
        with suppress(OSError, sqlite3.Error), self._guarded(fcntl.LOCK_EX | fcntl.LOCK_NB):
            with self._connected() as database:
                is_empty = not _has(database, _ANY)
            if is_empty:
                self._path.unlink()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]], max_bytes: int | None = None) -> None:
        """Carry out a statement for all rows, or for none."""
        with self._writing, self._open(max_bytes) as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(statement, rows)
            database.execute("COMMIT")

    @contextmanager
    def _open(self, max_bytes: int | None = None) -> Iterator[sqlite3.Connection]:
        """Open a connection for one method; roll back uncommitted work at its end."""
        try:
            self._make_folder()
            with self._guarded(fcntl.LOCK_SH), self._connected() as database:
                if max_bytes is not None:
                    (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
                    database.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_bytes)}")
                yield database
        except (sqlite3.Error, OSError) as error:
            reason = str(error)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                reason = f"it has reached METERFALL_SPOOL_MAX_BYTES ({self._max_bytes}), or the disk is full"
            raise SpoolUnavailable(str(self._path), reason) from error

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
            # FULL would sync all but the removal of the journal, which completes a commit.
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute(_TABLE)
            if not _has(database, _HAS_TRACES):
                database.execute("BEGIN IMMEDIATE")
                if not _has(database, _HAS_TRACES):  # another process may have been first
                    database.execute(_ADD_TRACES)
                database.execute("COMMIT")
            yield database

    @contextmanager
    def _guarded(self, lock: int) -> Iterator[None]:
        """Hold a lock: shared by all processes with the file open, exclusive to delete it."""
        with self._path.with_suffix(".lock").open("ab") as guard:
            fcntl.flock(guard, lock)
            try:
                yield
            finally:
                _unlock(guard)

    def _make_folder(self) -> None:
        """Make the folder, readable by its owner only, and sync it so that it survives a power cut."""
        folder = self._path.parent
        if folder.exists():
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


class SendingTurn:
    """The right to send what is in the spool, until it is closed or its process dies."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def close(self) -> None:
        """Give it back."""
        _unlock(self._file)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unlock(file: IO[bytes]) -> None:
    """Give a lock back by name: a child that was forked meanwhile has the file open as well, and would keep it."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _has(database: sqlite3.Connection, what: str) -> bool:
    return bool(database.execute(what).fetchone()[0])
