"""Tests of worker/keyspace: scripts, entries, signatures and reads, as Redis sees them."""
