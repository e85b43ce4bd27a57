"""Tests of worker/keyspace: scripts, stream entries, signatures and reads, on a real Redis."""
