"""Changes by operators and payment webhooks: accounts, credits, dead letters, partitions.

- `change`: the unit of work of every change of an account: lock, bring up to date, store, COMMIT
- `accounts`: opening, status, trust, plan, renewal
- `credits`: grants, claw-backs, signup seeds, carry-overs, reversals
- `erasure`: closing an account for good
- `transfer`: export and import of accounts; `transfer_rows`: the values of a row, and messages about bad ones
- `relay_import`: accounts from the ledger file of a relay
- `catalogue_diff`: the effect of an edited catalogue; `catalogues`: put one in force
- `dead_letters`: list, group, replay, drop
- `partitions`: their number, pause, resume
"""
