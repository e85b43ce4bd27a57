"""Tests of the project around the code: documents, configuration, roles, TLS, logs, packaging."""
