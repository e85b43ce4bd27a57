"""meterfall's worker: from a usage event on Redis to the books in Postgres. One line a room, from roof to ground.

Imports go downwards only; `make check` holds the rooms to it.

- `cli`: the commands, `meterfall …`; one file for each group
- `demo`: real servers, made and recorded load, and the proof after it; no dyno imports it
- `consumer`: the way of an event: doorbell → job → the ten steps of a batch → Redis
- `reports`: what operators and users read, and the proof that the books are right
- `client`: what services call: `from worker.client import Billing`
- `admin`: what operators and payment webhooks change
- `resources`: what one process holds: settings, catalogue, Postgres, Redis
- `ledger`: Postgres: every statement, the migrations, the order of locks
- `keyspace`: Redis: every key, script, stream entry, connection
- `rules`: who pays, which period, what a change is, and the values they work on; pure
- `errors`, `crash`, `process`: what every room may use

`jobs` keeps the names by which RQ finds the jobs. `config` and `schemas` lie below all rooms.
"""
