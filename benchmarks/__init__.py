"""The benchmark behind `meterfall bench`: what this machine drains, answers and needs, beside its own ceilings."""
