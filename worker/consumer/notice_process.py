"""The process that sends notices, `python -m worker.consumer.notice_process [PIPE]`.

The supervisor starts it when the first notice is due, and watches it. It is an RQ worker for the queue of the notices
alone: a webhook that hangs delays no drain. PIPE takes its counts.
"""

from __future__ import annotations

import sys

from worker.consumer.jobs import notice_queue
from worker.consumer.worker_process import work

if __name__ == "__main__":
    sys.exit(work("notices", notice_queue, sys.argv[1:]))
