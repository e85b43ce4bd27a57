"""Tests of worker/client: what services call, with both clients."""
