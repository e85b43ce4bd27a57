-- sponsor_credit: a share of a request's payment flows into the pool. The drain recognises a repeat.
-- KEYS 1 stream, 2 rung
-- ARGV 1 request, 2 paid, 3 ring ttl ms, 4 trace
-- Returns 1 if the bell must ring.
tell(KEYS[1], ARGV[4], 'k', 'credit', 'request', ARGV[1], 'paid', ARGV[2])
return ring(KEYS[2], ARGV[3])
