"""The names by which RQ finds our jobs; what they do is in worker/consumer/jobs.py.

A queue outlives a release, and old and new workers share it during a rolling deploy. Both know these names.
"""

from worker.consumer.jobs import (
    drain,
    expire_holds,
    look_for_notices,
    recount,
    renew_due,
    roll_up,
    send_notices,
    sum_up,
    verify,
)

__all__ = [
    "drain",
    "expire_holds",
    "look_for_notices",
    "recount",
    "renew_due",
    "roll_up",
    "send_notices",
    "sum_up",
    "verify",
]
