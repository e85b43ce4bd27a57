-- check: may the user spend `amount` units now? Reads only, except that it takes expired holds out.
-- KEYS 1 balance, 2 pending, 3 holds, then per sub-meter: pending, holds; totals
-- ARGV 1 meter, 2 amount, 3… sub-meters; '-purchased' at the end, if purchased units do not count
-- Returns the answer of the gate (see common.lua), or {'load'}.
totals = table.remove(KEYS)
local allowance = leaves_purchased()
local _, reply = gate(now_ms(), 4, 3, allowance)
return reply
