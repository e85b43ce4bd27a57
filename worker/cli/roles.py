"""The role that each command needs: of Postgres as `meterfall_<role>`, of Redis by its name."""

from __future__ import annotations

from collections.abc import Sequence

# The longest beginning counts: a subcommand may need another role than its group.
ROLES = {
    "emit": "producer", "check": "producer", "charge": "producer", "remaining": "producer", "plan-backend": "producer",
    "reserve": "producer", "capture": "producer", "settle": "producer", "release": "producer", "holds": "operator",
    "plans": "none", "reverse": "operator", "catalogue": "operator", "account": "operator",
    "estimate": "producer", "pool": "operator",
    "usage": "operator", "explain": "operator", "report": "operator",
    "migrate": "owner", "worker": "worker", "status": "monitor", "health": "monitor", "pending": "operator",
    "verify": "operator", "repartition": "operator",
    "notices": "operator", "webhooks": "operator", "api-keys": "keys", "serve": "service",
    "dead": "operator", "partition": "operator", "spool": "producer", "cache": "operator",
    "demo": "owner", "replay": "owner", "bench": "owner",
}  # fmt: skip


def role_of(arguments: Sequence[str]) -> tuple[str, str]:
    """Return the command that arguments name, with its subcommand, and its role; two empty texts if they name none."""
    if not arguments or arguments[0] not in ROLES:
        return "", ""
    words = [arguments[0]]
    if len(arguments) > 1 and arguments[0] in {"account", "worker", "dead", "partition", "spool", "cache", "pool",
                                               "catalogue", "holds", "pending", "report",
                                               "notices", "webhooks", "api-keys"}:  # fmt: skip
        words += [arguments[1]] if not arguments[1].startswith("-") else []
    return " ".join(words), ROLES[arguments[0]]
