"""An RQ worker that forks a child for each job. README.md says how to run it.

python prefork.py
"""

from __future__ import annotations

import os

from narration import METER, billing
from redis import Redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer


def main() -> None:
    """Connect the client, then work until SIGTERM."""
    # Imports the driver of Postgres, too: each child, a copy of this process, would else do that for its one job.
    billing.check("nobody", METER)
    with Redis.from_url(os.environ["REDIS_URL"]) as connection:
        queue = Queue("narration", connection=connection, serializer=JSONSerializer)
        Worker([queue], connection=connection, serializer=JSONSerializer).work()


if __name__ == "__main__":
    main()
