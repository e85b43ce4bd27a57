-- The clock of a Redis in memory, before the text of each script: `ahead_ms` milliseconds ahead of the machine's.
local redis = {call = function(command, ...)
  if command ~= 'TIME' and command ~= 'XADD' then return redis.call(command, ...) end
  local time = redis.call('TIME')
  local ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + ahead_ms
  if command == 'TIME' then
    return {string.format('%.0f', math.floor(ms / 1000)), string.format('%.0f', ms % 1000 * 1000)}
  end
  local stream, _ = ...
  return redis.call('XADD', stream, string.format('%.0f-*', ms), select(3, ...))
end}
