"""What hosts call: `from worker.accounts import Accounts`. Needs Postgres and Redis.

- `blocking`: `Accounts`, which waits; `awaiting`: `AsyncAccounts`, which runs the same in threads of its own
"""

from worker.accounts.awaiting import AsyncAccounts
from worker.accounts.blocking import Accounts

__all__ = ["Accounts", "AsyncAccounts"]
