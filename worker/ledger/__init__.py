"""Postgres: every statement, and the migrations. Independent of the keyspace.

- `connection`: the pool of connections and their time-outs; snapshots, the ledger's clock and epoch
- `batch`: the statements of a batch, in the order in which it uses them
- `accounts`: reads of accounts, balances and single changes; accounts with a boundary that is due
- `finding`: accounts by what an operator knows of them
- `orders`: orders and invoices, each used once in all accounts
- `holds`: holds that the ledger grants while Redis is down
- `sponsorship`: the pool's row, its grants and its credits
- `dead_letters`: refused stream entries; `partitions`: the number of partitions, their locks and pauses
- `catalogues`: the catalogues in force over time, and what accounts need of one
- `lives`: the lives of Redis, and who acknowledged that it lost its data
- `api_keys`: keys of the HTTP service, and the hashes of their secrets
- `erasure`: the move of a closed account's history to its pseudonym
- `reports`: roll-ups of the usage log, and the reports; `proof`: the whole history for the proof
- `summing`: usage of all accounts, summed up per day and per account and month, and the changes after the sums
- `overviews`: the reports over all accounts
- `checkpoints`: where the proof of each account goes on, and its run under way
- `columns`: rows in bulk, as array literals and COPY; `sqlstate`: kinds of SQL error, such as transient ones
- `migrate` runs `migrations/`; `tables`: the schema that they make, for readers

The lock order
--------------

A transaction takes its locks in this order, and skips locks that it does not need. So transactions may wait for each
other, but never in a circle. tests/faults/test_lock_orders.py tests the order of accounts and of the pool.

1. A partition's lock: an advisory lock of the transaction. A drain only tries it, so nothing waits for it.
2. Account rows, in the order of their ids, which sort by bytes. FOR UPDATE to change them; FOR KEY SHARE to wait for
   their changes. A batch inserts new accounts after the locked ones, also in the order of their ids.
   The account's lock covers its balances, ledger entries and ledger holds.
3. Keys of orders. A transaction claims one, after its account; an import claims many, sorted, after all its accounts.
4. The pool's row, FOR UPDATE.
5. The row of an account in `rollup_state`. It covers the account's roll-ups.
6. The lock of the sums: an advisory lock of the transaction. It covers all sums for reports.
7. Rows of dead letters.
8. The lock of the proof's writes: an advisory lock of the transaction. It covers checkpoints and the run under way.

Other rows need no place in this order, as no transaction that holds one waits for another kind: an open pause, and the
row of the ledger itself (epoch, number of partitions).

| transaction | locks, in this order |
|---|---|
| batch of usage | its partition; its accounts, then those it opens; it inserts dead letters, deletes ledger holds |
| batch of the pool | its partition; accounts whose trust changed (KEY SHARE); the pool; it inserts dead letters |
| change of an account, carry-over | one account or two; a new account is inserted; a grant claims its order |
| import of accounts | new accounts only, sorted over all its chunks; then their orders, sorted |
| renewals | the due accounts of a chunk; it skips locked ones |
| erasure | the account, then its pseudonym; its orders; the pool; its roll-up; sums; dead letters; proof's writes |
| hold while Redis is down | the account; it inserts a ledger hold |
| ledger holds that Redis took over | these ledger holds, without the account |
| roll-up | the account's row in `rollup_state`, never the account |
| summing up for reports | the lock of the sums, which it only tries; never an account |
| replay or drop of a dead letter | that dead letter |
| pause, resume | the open pause of the partition |
| change of the number of partitions | every partition; the row of the ledger |
| new epoch, first start | the row of the ledger |
| a catalogue is registered, a life of Redis begins | an advisory lock of its own |
| step of the proof | an advisory lock of its own for the writes of checkpoints, never the account |
| an API key is made or revoked | that key; one of the same name waits for it |
| report, export | none: they only read |

- A batch skips locked accounts from its third attempt on (`skip_locked`); their stream entries stay.
- The ledger holds of one account have no order among themselves. A batch and a takeover that delete the same two may
  wait in a circle: Postgres ends one of them, with a transient error.
- Only the holder of a partition's lock inserts dead letters of that partition, so these inserts wait for nothing.
- A lock never outlives its transaction, and time-outs bound each wait. A deadlock with another client is a transient
  error: the drain retries the batch.
- Migrations run one at a time, under an advisory lock of a session of their own. A migration waits for a table for half
  a second at most, then gives way and tries again; see `migrate`.
"""
