"""Tests of worker/accounts: the calls of a host about accounts."""
