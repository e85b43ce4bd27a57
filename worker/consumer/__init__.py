"""The way of an event: doorbell → job → drain → the ten steps of a batch → Redis.

`batch.apply_batch` is the heart, and reads like this list:

1. Begin, and try the partition's lock: it falls with the transaction, and a drain that finds it taken ends.
2. Read the stream, oldest first, bounded in number and bytes, and mark the range as in hand.
3. Judge each stream entry: an event, a refresh, or a dead letter with its reason.
4. Lock the accounts in sorted order; then read balances, recorded events and the clock.
5. Apply due boundaries.
6. Drop duplicates: under the lock, no other transaction records them meanwhile.
7. Take each amount down the waterfall, in the order of the stream.
8. Write usage log, ledger entries and dead letters; update balances.
9. COMMIT: the only one, in the same round trip.
10. Publish: balances appear and ids leave pending, together; then the stream entries are deleted.

The rest of the room, in the order in which an event meets it:

- `supervisor`: a dyno's loop and its doorbell; `sweep`: work without a ring; `child`: its processes
- `worker_process`, `proof_process`, `jobs`: RQ
- `drain`: the loop over batches, retries and halves; `hand`: reads, and marks the range; `publisher`: in commit order
- `rounds`: small backlogs of many partitions, in one transaction
- `recovery`: the range of a dead worker, and poison
- `books`: the protocol of a stream's books, which `usage` and `sponsorship` keep; `intake`: judges events
- `refusals`, `pausing`: refused stream entries in the log, and too many of them
- `tally`: what processes count, on its way to the dyno's endpoint
- `renewals`: due boundaries
"""
