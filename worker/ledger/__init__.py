"""Postgres: every statement, and the migrations. Independent of the keyspace."""
