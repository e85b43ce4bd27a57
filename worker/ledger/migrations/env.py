"""Alembic's start: run the migrations on the connection of worker.ledger.migrate, or print them."""

from alembic import context

from worker.ledger.migrations import VERSION_TABLE

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        transaction_per_migration=True,
        version_table=VERSION_TABLE,
    )
else:
    context.configure(
        connection=context.config.attributes["connection"], transaction_per_migration=True, version_table=VERSION_TABLE
    )
with context.begin_transaction():
    context.run_migrations()
