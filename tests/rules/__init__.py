"""Tests of worker/rules: golden cases, and what must hold for any request. No servers."""
