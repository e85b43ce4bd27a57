"""The way of an event: doorbell, job, the ten steps of a batch, Redis."""
