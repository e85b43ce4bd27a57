"""The soak: seeded random load and faults over real processes, and the books proved at every quiet point.

Start reading at `run.py`. The seed of a run repeats it: load and order of faults are the same, only their exact moments
depend on the machine.
"""
