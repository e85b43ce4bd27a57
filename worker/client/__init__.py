"""The client for services: `from worker.client import Billing`. Needs redis and pydantic only.

- `billing`: `Billing`, which waits, and `AsyncBilling`, which awaits; `holds`: a hold in the hand of a service
- `keeping`: renewals of holds while a `with` block runs
- `methods`: how operations become methods; `waiting`: how they run in a thread that waits for each step
- `awaiting`, `lanes`: how they run on an event loop, and how commands travel
- `session`: the state of a client, and how one call runs to its end
- `effects`: the steps that an operation is made of
- `arguments`: checks of arguments, and the price of a call; `models`: models that the catalogue does not know
- `preflight`: the calls that ask; `recording`: the calls that record; `sponsorship`: the calls about the pool
- `loading`: loads of balances that Redis has not cached; `ledger`: the door to Postgres, opened only when needed
- `spooling`: recording calls that Redis does not confirm; `spool_file`, `spool_items`: the file and its items
- `sending`: the thread that sends them later
"""

from worker.client.billing import AsyncBilling, Billing
from worker.client.holds import AsyncHold, Hold
from worker.client.recording import new_key

__all__ = ["AsyncBilling", "AsyncHold", "Billing", "Hold", "new_key"]
