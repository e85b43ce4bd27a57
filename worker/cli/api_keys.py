"""The commands about API keys: who may call the HTTP service."""

from __future__ import annotations

from typing import Annotated

import typer

from schemas.codes import Role
from worker.cli.confirm import confirm
from worker.cli.io import login, open_resources, parse_optional_time, print_answer, print_json, print_rows
from worker.cli.options import ActorOption, CauseOption, JsonOption, LimitOption, YesOption

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="Say who may call the HTTP service, and revoke that.")
app.add_typer(keys_app, name="api-keys")

RoleOption = Annotated[
    Role,
    typer.Option(help="what it may do: send usage and ask; read; read and correct accounts; all", case_sensitive=True),
]
ExpiresOption = Annotated[
    str | None,
    typer.Option("--expires", help="its end, ISO 8601 with offset; without, it has none", show_default=False),
]


@keys_app.command("add")
def api_keys_add(
    name: Annotated[str, typer.Argument(help="name of the caller; changes name it as their author")],
    role: RoleOption,
    expires: ExpiresOption = None,
    by: ActorOption = None,
    reason: CauseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key for a caller of the HTTP service, and show it once."""
    from worker.admin import api_keys

    expires_at = parse_optional_time("--expires", expires)
    with open_resources(claim=False) as resources:
        added = api_keys.add(resources, name, role, expires_at=expires_at, actor=login(by), reason=reason)
    if as_json:
        print_json({**added.key._asdict(), "secret": added.secret})
        return
    until = "" if expires_at is None else f" until {expires_at.isoformat()}"
    typer.echo(f"{added.key.key_id}: {role} {name}{until}; its key, which nothing shows again:")
    typer.echo(added.secret)


@keys_app.command("list")
def api_keys_list(
    with_revoked: Annotated[bool, typer.Option("--all", help="also keys that were revoked")] = False,
    limit: LimitOption = 1_000,
    as_json: JsonOption = False,
) -> None:
    """List the keys, newest first, without their secrets."""
    from worker.admin import api_keys

    with open_resources(claim=False) as resources:
        now, found = api_keys.listed(resources, with_revoked=with_revoked, limit=limit)
    rows = [{**each._asdict(), "state": each.state_at(now)} for each in found]
    shown = ["key_id", "name", "role", "state", "created_at", "created_by", "expires_at"]
    if with_revoked:
        shown += ["revoked_at", "revoked_by", "revoked_reason"]
    if not as_json:
        rows = [{name: row[name] for name in shown} for row in rows]
    print_rows(rows, as_json)


@keys_app.command("revoke")
def api_keys_revoke(
    key: Annotated[str, typer.Argument(help="id or name of the key; the id is in the secret, after mf_")],
    by: ActorOption = None,
    reason: CauseOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """End a key for good. Services refuse it within METERFALL_API_KEY_TRUSTED_MS."""
    from worker.admin import api_keys

    with open_resources(claim=False) as resources:
        confirm(f"key {key} would be revoked: its caller gets no answer any more", yes=yes, is_final=True)
        revoked = api_keys.revoke(resources, key, actor=login(by), reason=reason)
    print_answer(f"revoked {revoked.key_id}, {revoked.name}", revoked._asdict(), as_json)
