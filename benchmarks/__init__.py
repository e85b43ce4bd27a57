"""The benchmark behind `meterfall bench`: throughput, latencies and memory of this machine, beside its own ceilings."""
