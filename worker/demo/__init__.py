"""Real servers, made and recorded load, and the proof after it. No dyno imports this room."""
