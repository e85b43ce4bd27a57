"""The commands about notices: what was told, and where it is sent."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.confirm import confirm
from worker.cli.io import DONE, REFUSED, login, open_resources, print_answer, print_fields, print_json, print_rows
from worker.cli.options import ActorOption, JsonOption, LimitOption, YesOption
from worker.rules.words import counted

app = typer.Typer()
notices_app = typer.Typer(no_args_is_help=True, help="Look at what accounts and operators were told.")
webhooks_app = typer.Typer(no_args_is_help=True, help="Say where notices are sent, signed.")
app.add_typer(notices_app, name="notices")
app.add_typer(webhooks_app, name="webhooks")

KindsOption = Annotated[list[str] | None, typer.Option("--kind", help="only this kind; repeatable")]
UserOption = Annotated[str | None, typer.Option("--user", help="only what is told about this account")]


@notices_app.command("list")
def notices_list(
    kinds: KindsOption = None,
    user: UserOption = None,
    dead: Annotated[
        bool, typer.Option("--dead", help="deliveries that were given up instead, the oldest first")
    ] = False,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List the notices that were told last, newest first."""
    from worker.admin import notices

    with open_resources() as resources:
        if dead:
            given_up = notices.dead(resources, limit)
            print_rows([each._asdict() for each in given_up], as_json)
            return
        found = notices.latest(resources, limit=limit, kinds=kinds or None, user_id=user)
    rows = [
        {
            "notice": each.notice_id,
            "at": each.told_at,
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
    print_fields({"type": body["type"], "timestamp": found.told_at, **body["data"]}, as_json=False)
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


@notices_app.command("replay")
def notices_replay(
    notice: Annotated[str | None, typer.Argument(help="id of a notice; without one, all", show_default=False)] = None,
    webhook: Annotated[str | None, typer.Option("--webhook", help="only deliveries to this webhook")] = None,
    as_json: JsonOption = False,
) -> None:
    """Send deliveries again that were given up, each with all its attempts."""
    from worker.admin import notices

    with open_resources() as resources:
        found = notices.replay(resources, notice, webhook)
    print_answer(f"{counted(found, 'delivery')} will be sent again", {"replayed": found}, as_json)


# ---------------------------------------------------------------------------------------------------------------------
# Webhooks

WebhookArgument = Annotated[str, typer.Argument(help="id of the webhook; `webhooks list` has all")]
_TEST_SECONDS = 15.0


@webhooks_app.command("add")
def webhooks_add(
    url: Annotated[str, typer.Argument(help="https://host/path")],
    kinds: KindsOption = None,
    by: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a webhook, and show its secret once. It gets what is told from now on."""
    from worker.admin import webhooks

    with open_resources() as resources:
        added = webhooks.add(resources, url, kinds=kinds or None, by=login(by))
    _print_secret(added.webhook_id, added.secret, as_json)


@webhooks_app.command("rotate")
def webhooks_rotate(
    webhook: WebhookArgument,
    overlap_hours: Annotated[
        float, typer.Option(min=0, max=720, help="hours for which the old secret signs beside the new one")
    ] = 24,
    as_json: JsonOption = False,
) -> None:
    """Give a webhook a new secret, and show it once. For some hours the old one signs also."""
    from worker.admin import webhooks

    with open_resources() as resources:
        added = webhooks.rotate(resources, webhook, overlap_hours)
    _print_secret(added.webhook_id, added.secret, as_json)


@webhooks_app.command("list")
def webhooks_list(as_json: JsonOption = False) -> None:
    """List all webhooks, without their secrets."""
    from worker.admin import webhooks

    with open_resources() as resources:
        found = webhooks.listed(resources)
    rows = [{**each._asdict(), "kinds": ", ".join(each.kinds) if each.kinds else "all"} for each in found]
    print_rows(rows, as_json)


@webhooks_app.command("test")
def webhooks_test(
    webhook: WebhookArgument,
    wait_seconds: Annotated[
        float, typer.Option(min=0, max=600, help="how long to wait for the answer")
    ] = _TEST_SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Have a dyno send a notice of kind webhook.test, and say what came of it. Exit code 1 unless it was delivered."""
    from time import monotonic, sleep

    from worker.admin import webhooks

    with open_resources() as resources:
        notice_id = webhooks.send_test(resources, webhook)
        stop_at = monotonic() + wait_seconds
        while True:
            outcome = webhooks.outcome(resources, notice_id)
            if outcome is None or outcome.error is not None or outcome.state != "waiting" or monotonic() >= stop_at:
                break
            sleep(0.1)
    state, error = (outcome.state, outcome.error) if outcome else ("gone", None)
    text = error or ("no dyno has sent it yet" if state == "waiting" else "")
    print_answer(
        f"{notice_id}: {state}{f': {text}' if text else ''}",
        {"notice_id": notice_id, "state": state, "error": error},
        as_json,
    )
    raise typer.Exit(DONE if state == "delivered" else REFUSED)


@webhooks_app.command("remove")
def webhooks_remove(webhook: WebhookArgument, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Delete a webhook, its secrets, and what was still to be sent to it."""
    from worker.admin import webhooks

    with open_resources() as resources:
        confirm(f"webhook {webhook} would be deleted, with what was not delivered yet", yes=yes, is_final=True)
        webhooks.remove(resources, webhook)
    print_answer(f"removed {webhook}", {"webhook_id": webhook}, as_json)


def _print_secret(webhook_id: str, secret: str, as_json: bool) -> None:
    if as_json:
        print_json({"webhook_id": webhook_id, "secret": secret})
        return
    typer.echo(f"webhook {webhook_id}; its secret, which nothing shows again:")
    typer.echo(secret)
