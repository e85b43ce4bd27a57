"""Reports for operators and users, and the proof that the books are right. It only reads the ledger.

- `usage`: the reports of an account: summary, breakdown, engagement, timeline
- `finding`: accounts by id, name in logs, plan or status
- `explain`: the payment of one event, with reasons
- `overviews`: the reports over all accounts
- `holds`: open holds
- `status`: backlog, age, pending and throughput, from the servers that answer
- `health`: what is wrong with the system, as pure checks of its status
- `proof_result`: the result of the last proof
- `sponsorship`: the sponsorship pool, its promises and last grants
- `proof_run`: the proof in steps, from the checkpoint of each account; `proof_state`: a replay as JSON
- `proof`: the replay of every change of every account, compared with Postgres and Redis
- `proof_sponsorship`: the same for every grant and credit of the pool
- `proof_sums`: the sums of the reports over all accounts, compared with the log
"""
