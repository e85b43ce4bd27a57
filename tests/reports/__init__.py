"""Tests of worker/reports: what operators and users read, and the proof."""
