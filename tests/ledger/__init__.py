"""Tests of worker/ledger: the schema, and connections to a Postgres that misbehaves."""
