"""Migrations of the ledger, run by `meterfall migrate`."""
