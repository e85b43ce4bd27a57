"""The process of the proof, `python -m worker.consumer.proof_process`; the supervisor starts and watches it.

It is an RQ worker for the queue of the proof alone.
"""

from __future__ import annotations

import sys

from worker.consumer.jobs import proof_queue
from worker.consumer.worker_process import work

if __name__ == "__main__":
    sys.exit(work("proof", proof_queue))
