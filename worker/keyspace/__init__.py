"""Redis: every key, script, stream entry and connection. Independent of the ledger.

- `keys`: the name of every key, by its owner: a partition, an account in it, the sponsorship pool
- `lua/`: the scripts; each one's head lists its keys, arguments and replies
- `scripts`: their texts with what they share, and how one is run
- `calls`: one function for each script, which puts its keys and arguments in order
- `cache`: balances, the pool and standings as the text that scripts read
- `entries`: stream entries as bytes; `signatures`: who vouches for them
- `reader`: a stream in pieces that are bounded in bytes
- `connection`: clients, their time-outs and retries, and the clock of Redis
"""
