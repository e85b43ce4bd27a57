"""Reports for operators and users, and the proof that the books are right. It only reads the ledger.

- `usage`: the reports of an account: summary, breakdown, engagement, timeline
- `explain`: the payment of one event, with reasons
- `holds`: open holds
- `status`: backlog, age, pending and throughput per partition
- `sponsorship`: the sponsorship pool, its promises and last grants
- `proof`: the replay of every change of every account, compared with Postgres and Redis
- `proof_sponsorship`: the same for every grant and credit of the pool
"""
