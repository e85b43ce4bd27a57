"""Pure rules: the buckets that pay, periods, changes, and the values they work on. No I/O.

- `account`: an account and its balances at one version; facts about the pool
- `waterfall`: the buckets that pay
- `calendar`: boundaries of periods by the calendar
- `periods`: the allowance in force, its bounds, and the rest of a closed period
- `lifecycle`: opening an account, its boundaries, changes of plan and status
- `history`: the ledger entry of every change that is not usage
- `received`: the kinds of stream entry: an event, a refusal, a refresh
- `rows`: rows that one transaction of the ledger reads and writes
- `batch`: the effect of a batch of stream entries on its accounts
- `sponsorship`: the part of a request that the pool covers
- `preflight`: questions to the gate, and its answers
- `routing`: the backend for a request
- `checkpoint`: where the proof of an account goes on, and when it begins at zero
- `explanations`: checks and events in words
"""
