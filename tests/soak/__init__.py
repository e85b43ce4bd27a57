"""The soak: seeded random load and faults over real processes, and the books proved at every quiet point.

Start reading at `run.py`. A run is repeated with its seed: what is sent and which faults follow each other is the same,
when exactly they meet is up to the machine.
"""
