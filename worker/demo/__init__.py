"""Real servers, made and recorded load, and the proof after it. No dyno imports this room.

- `servers`: PostgreSQL and Redis for the demo, the bench and the tests
- `processes`: child processes that do not outlive us; trees of processes, frozen, thawed or killed
- `stage`: what demo and replay share: servers, workers, accounts, and the proof at the end
- `services`: `meterfall demo`, its producers and workers
- `work`: the load of the demo, from a seed
- `sponsorship`: the demo's act about the sponsorship pool
- `credits`, `receiver`: the demo's act about credits, limits and notices; where these are delivered
- `periods`: the demo's last act, in which periods end
- `replay`: `meterfall replay`, a recorded trace as load
"""
