"""Pure rules: who pays, which period, what a change is, and the values they work on. No I/O.

- `account`: an account and its balances at one version; what is known of the pool
- `waterfall`: which bucket pays
- `calendar`: boundaries of periods by the calendar
- `periods`: the allowance in force, from when to when, and the rest of a closed period
- `lifecycle`: opening an account, its boundaries, changes of plan and status
- `history`: the ledger entry of every change that is not usage
- `received`: what a stream entry can be: an event, a refusal, a refresh
- `rows`: what one transaction of the ledger reads and writes
- `batch`: what a batch of entries does to the accounts it names
- `sponsorship`: what the sponsorship pool covers of a request
- `preflight`: what the gate is asked, and its answers
- `routing`: which backend does a request
- `explanations`: checks and events in words
"""
