"""Tests of worker/admin: what operators and payment webhooks change."""
