"""Redis: every key, script, stream entry and connection. Independent of the ledger."""
