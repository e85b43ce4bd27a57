"""`python -m worker …` is the same as `meterfall …`."""

from worker.cli import main

main()
