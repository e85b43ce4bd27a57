-- sponsor_credit: of what was paid for a request, a share flows into the pool. A repeat is known when it is applied.
-- KEYS 1 stream, 2 rung
-- ARGV 1 request, 2 paid, 3 ring ttl ms
-- Returns 1 when the bell must ring.
return tell(KEYS[1], KEYS[2], ARGV[3], 'k', 'credit', 'request', ARGV[1], 'paid', ARGV[2])
