"""Who resolved a dead letter, why and with how many others; and what its payload names."""

from alembic import op

revision = "0020"
down_revision = "0019"

STATEMENTS = [
    # Neither default nor CHECK: no row is read or written. Letters that were resolved before have none of it.
    "ALTER TABLE dead_letter ADD COLUMN resolved_by text",
    "ALTER TABLE dead_letter ADD COLUMN resolved_reason text",
    "ALTER TABLE dead_letter ADD COLUMN resolved_letters bigint",
    # A refused payload may be anything: what is no JSON object, or has no such field, names nothing. No text holds NUL.
    r"""
    CREATE FUNCTION payload_text(payload bytea, field text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN
        RETURN replace(convert_from(payload, 'UTF8'), '\u0000', '\ufffd')::json ->> field;
    EXCEPTION WHEN OTHERS THEN
        RETURN NULL;
    END $$
    """,
]


def upgrade() -> None:
    """Create the columns, empty, and the function. A worker of the former release writes none of them, and goes on."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns: who resolved which letter and why is forgotten, nothing else."""
    op.execute("DROP FUNCTION payload_text(bytea, text)")
    for column in ("resolved_letters", "resolved_reason", "resolved_by"):
        op.execute(f"ALTER TABLE dead_letter DROP COLUMN {column}")
