"""The console at `/console`: pages for operators and support people, made by the server, without a script.

- `app`: every page, the right that it needs, and the guard before it; `visit`: sessions, forms, one request
- `overview`: the state of the system; `accounts`: search, account, event; `letters`: dead letters
- `reports`: usage of all accounts by day, and who used most
- `actions`: changes of an account, each with a preview; `previews`: what a change would do, and its limits
- `notices`: what was told, webhooks and deliveries; `catalogues`: a file compared and tried
- `proofs`: the last proof of all balances; `prover`: one that a person starts
- `pictures`: how much of each bucket is left, as figures of an SVG; `render`: templates, and texts for people
"""
