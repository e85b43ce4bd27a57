"""Tests of worker/consumer: the way of an event from the doorbell to the books."""
