"""The commands about notices: what was told, and where it is sent."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.io import open_resources, print_fields, print_json, print_rows
from worker.cli.options import JsonOption, LimitOption

app = typer.Typer()
notices_app = typer.Typer(no_args_is_help=True, help="Look at what accounts and operators were told.")
app.add_typer(notices_app, name="notices")

KindsOption = Annotated[list[str] | None, typer.Option("--kind", help="only this kind; repeatable")]
UserOption = Annotated[str | None, typer.Option("--user", help="only what is told about this account")]


@notices_app.command("list")
def notices_list(
    kinds: KindsOption = None, user: UserOption = None, limit: LimitOption = 50, as_json: JsonOption = False
) -> None:
    """List the notices that were told last, newest first."""
    from worker.admin import notices

    with open_resources() as resources:
        found = notices.latest(resources, limit=limit, kinds=kinds or None, user_id=user)
    rows = [
        {
            "notice": each.notice_id,
            "at": each.created_at,
            "kind": each.kind,
            "user": each.user_id,
            "meter": each.meter,
            "rule": each.rule,
        }
        for each in found
    ]
    print_rows(rows, as_json)


@notices_app.command("show")
def notices_show(notice: Annotated[str, typer.Argument(help="id of the notice")], as_json: JsonOption = False) -> None:
    """Show a notice as receivers get it, and what became of it at each webhook."""
    from worker.admin import notices

    with open_resources() as resources:
        found, deliveries = notices.show(resources, notice)
    body = notices.notice_of(found).model_dump(mode="json", exclude_none=True)
    if as_json:
        print_json({**body, "deliveries": [each._asdict() for each in deliveries]})
        return
    print_fields({"type": body["type"], "timestamp": found.created_at, **body["data"]}, as_json=False)
    if deliveries:
        print_rows([each._asdict() for each in deliveries], as_json=False)


@notices_app.command("feed")
def notices_feed(
    after: Annotated[int, typer.Option(min=0, help="the cursor that the page before printed")] = 0,
    kinds: KindsOption = None,
    user: UserOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="notices of a page")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Print notices in the order in which they were told, a line of JSON each; the last line has the next cursor."""
    from worker.admin import notices

    with open_resources() as resources:
        page = notices.feed(resources, after=after, limit=limit, kinds=kinds or None, user_id=user)
    if as_json:
        print_json(page.model_dump(mode="json", exclude_none=True))
        return
    for each in page.notices:
        typer.echo(each.model_dump_json(exclude_none=True))
    typer.echo(f'{{"cursor": {page.cursor}}}')
