"""Tests of worker/demo: the servers it starts, the load it makes, and the replay of a trace."""
