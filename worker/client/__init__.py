"""What services call: `from worker.client import Billing`. Needs redis and pydantic only."""

from worker.client.billing import AsyncBilling, AsyncHold, Billing, Hold

__all__ = ["AsyncBilling", "AsyncHold", "Billing", "Hold"]
