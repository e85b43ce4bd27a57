"""Tests of the room `testing`: fakes that answer as the real clients do, and fixtures for host projects."""
