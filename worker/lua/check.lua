-- check: may `amount` units be spent now? Reads only, apart from taking expired holds out.
-- KEYS 1 balance, 2 pending, 3 holds
-- ARGV 1 meter, 2 amount
-- Returns {status, limit, used, rollover, purchased, spill, pending}; status allowed | denied |
-- absent (the plan has no such meter) | unknown (nobody opened the account); or {'load'}.
local _, reply = gate(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], now_ms())
return reply
