"""Redis: every key, script, stream entry and connection. Independent of the ledger.

- `keys`: the name of every key, by its owner: a partition, an account in it, the sponsorship pool
- `lua/`: the scripts; the head of each lists its keys, arguments and replies
- `scripts`: their texts with the shared part, and how one is run
- `calls`: one function for each script, which puts its keys and arguments in order
- `cache`: balances, the pool and standings as the text that scripts read
- `entries`: stream entries as bytes; `signatures`: proof of their producers
- `reader`: a stream in pieces that are bounded in bytes
- `totals`: what is pending and what was lost of each stream, without a scan; `server`: facts about the server
- `connection`: clients, their time-outs and retries, and the clock of Redis
"""
