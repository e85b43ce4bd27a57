"""What services call: `from worker.client import Billing`. Needs redis and pydantic only."""

from worker.client.billing import AsyncBilling, Billing
from worker.client.holds import AsyncHold, Hold

__all__ = ["AsyncBilling", "AsyncHold", "Billing", "Hold"]
