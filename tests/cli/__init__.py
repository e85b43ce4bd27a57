"""Tests of worker/cli: the commands as an operator meets them."""
