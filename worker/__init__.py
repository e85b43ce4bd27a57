"""meterfall's worker: from a usage event on Redis to the books in Postgres. One line a room, from roof to ground.

Imports go downwards only; `make check` holds the rooms to it.

- `cli`: the commands, `meterfall …`; one file for each group
- `testing`: clients without servers, and servers to start, for the tests of host projects
- `demo`: real servers, made and recorded load, and the proof after it; no dyno imports it
- `consumer`: the way of an event: doorbell → job → the ten steps of a batch → Redis
- `service`: the HTTP service, `meterfall serve`, beside the consumer
- `accounts`: the calls of a host about accounts: `from worker.accounts import Accounts`
- `reports`: reports for operators and users, and the proof that the books are right
- `contrib`: the client inside web frameworks, for services alone
- `client`: the calls of services: `from worker.client import Billing`
- `admin`: changes by operators and payment webhooks
- `resources`: settings, catalogue, Postgres and Redis of one process
- `ledger`: Postgres: every statement, the migrations, the order of locks
- `keyspace`: Redis: every key, script, stream entry, connection
- `rules`: who pays, which period, what a change is, and the values they work on; pure
- `errors`, `crash`, `process`, `tracing`: what every room may use

`jobs` keeps the names by which RQ finds the jobs. `config` and `schemas` lie below all rooms.
"""
