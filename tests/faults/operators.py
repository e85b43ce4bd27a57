"""Operators with the runbook and a shell, each command under the login of a role."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from config.settings import PREFIX, Settings, variable_name
from schemas.events import UsageEvent
from tests.faults.house import House
from tests.support.console import Shell, blocks_of, sections_of
from tests.support.paths import ROOT

ROLES = ("operator", "producer", "worker", "monitor")
RUNBOOK = sections_of((ROOT / "docs/runbook.md").read_text(encoding="utf-8"))


class Operator:
    """An operator with the runbook and a shell; each command runs under the login in its prompt."""

    def __init__(self, house: House) -> None:
        self.folder = house.folder / "operator"
        self.folder.mkdir()
        (self.folder / "config").symlink_to(ROOT / "config")
        programs = Path(house.postgres.command[0]).parent
        environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environ |= {variable_name(name): str(getattr(house.settings, name)) for name in house.settings.model_fields_set}
        self.shell = Shell(self.folder, environ | {"PATH": f"{programs}:{environ['PATH']}"})
        self._left: list[str] = []
        self.use(house.settings)

    def use(self, settings: Settings, owner: str = "meterfall") -> None:
        """Let all logins go to the servers of `settings` from now on."""
        for role in ROLES:
            theirs = settings_of(role, settings)
            self.shell.login(role, {"DATABASE_URL": str(theirs.database_url), "REDIS_URL": theirs.redis_url})
        for name, login in (("owner", owner), ("admin", "meterfall")):
            self.shell.login(name, {"DATABASE_URL": as_login(login, settings)})

    @contextmanager
    def procedure(self, heading: str) -> Iterator[None]:
        """Open the runbook at a heading for the length of the block, which must run all its commands."""
        self._left = [block.text for block in blocks_of(RUNBOOK[heading]) if block.language == "console"]
        yield
        assert self._left == []

    def follow(self) -> str:
        """Run the next block of the procedure, and compare with its output in the runbook. Return the real output."""
        wrong = self.shell.run(self._left.pop(0))
        assert wrong == [], (wrong, self.shell.printed)
        return "\n".join(self.shell.printed)

    def skip(self) -> None:
        """Skip the next block of the procedure, which is for another case."""
        self._left.pop(0)

    def keep(self, name: str, events: Iterable[UsageEvent]) -> None:
        """Write a file of events kept by services."""
        lines = (event.model_dump_json(exclude_none=True) for event in events)
        (self.folder / name).write_text("\n".join(lines), encoding="utf-8")


def put_roles_in_force(url: str) -> None:
    """Apply config/postgres-roles.sql, and make a login for each role."""
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute((ROOT / "config/postgres-roles.sql").read_text(encoding="utf-8").encode())
    make_logins(url)


def make_logins(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        for role in ROLES:
            admin.execute(f"CREATE ROLE login_{role} LOGIN IN ROLE meterfall_{role}")


def redis_roles() -> dict[str, list[str]]:
    """Return the rules of each user of config/redis.acl, without passwords."""
    lines = (ROOT / "config/redis.acl").read_text(encoding="utf-8").splitlines()
    users = [re.sub(r"#<[\w-]+>", "nopass", line).split()[1:] for line in lines if line.startswith("user ")]
    return {name: rules for name, *rules in users if name in ROLES}


@contextmanager
def redis_users(house: House) -> Iterator[None]:
    """Load the users of config/redis.acl beside the default user with all rights, until Redis restarts."""
    for name, rules in redis_roles().items():
        house.redis.execute_command("ACL SETUSER", name, "reset", *rules)
    yield
    house.redis.execute_command("ACL DELUSER", *ROLES)


def settings_of(role: str, settings: Settings) -> Settings:
    """Return the settings of a process that logs in as `role` at both servers."""
    redis_url = settings.redis_url.replace("unix://", f"unix://{role}:any@")
    return settings.model_copy(update={"database_url": as_login(f"login_{role}", settings), "redis_url": redis_url})


def as_login(login: str, settings: Settings) -> str:
    """Return the URL of the ledger with another login."""
    return str(settings.database_url).replace("meterfall@", f"{login}@", 1)
