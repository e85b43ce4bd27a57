"""The console while servers are away or hang: pages that say so."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from tests.service.test_processes import METER, USER, own_postgres, serving_on
from tests.support.ledger import give_account
from tests.support.pages import Person
from tests.support.waiting import wait_until
from worker.demo.servers import Server

__all__ = ["own_postgres"]


def test_pages_tell_of_servers_that_are_away(own_postgres: Server, own_redis: Server, tmp_path: Path) -> None:
    with serving_on(own_postgres, own_redis, tmp_path) as (served, settings):
        give_account(settings, USER, "basic")
        person = Person(served.port)
        person.sign_in(served.secrets["operator"])
        account = f"/console/account?user_id={USER}"
        assert person.get(account).status == 200

        own_redis.kill()
        wait_until(lambda: "Waiting not known" in person.get("/console/").text, "the overview tells", seconds=15)
        overview = person.get("/console/").text
        assert "Postgres: answers" in overview
        assert "Accounts 1" in overview
        page = person.get(account)
        assert (page.status, "Not known while Redis is away" in page.text) == (200, True)
        path = "/console/account/grant"
        form = person.get(f"{path}?user_id={USER}").form(path)
        refused = person.send(form, meter=METER, amount="5", reason="sorry", step="preview")
        assert (refused.status, "Redis does not answer" in refused.text) == (503, True)

        own_redis.start()
        wait_until(lambda: "Waiting 0" in person.get("/console/").text, "Redis is back", seconds=15)
        own_postgres.kill()
        wait_until(lambda: "Accounts not known" in person.get("/console/").text, "the overview tells", seconds=15)
        overview = person.get("/console/").text
        assert "Waiting 0" in overview
        assert "Not known while Postgres is away" in overview
        page = person.get(account)
        assert (page.status, "Postgres does not answer" in page.text) == (503, True)

        own_redis.kill()
        wait_until(lambda: "Waiting not known" in person.get("/console/").text, "both are away", seconds=15)
        assert person.get(account).status == 503
        stranger = Person(served.port)
        refused = stranger.sign_in("mf_0123456789ab_" + "A" * 43)
        assert (refused.status, "Postgres does not answer" in refused.text) == (503, True)


def test_pages_do_not_wait_for_servers_that_hang(own_postgres: Server, own_redis: Server, tmp_path: Path) -> None:
    with serving_on(own_postgres, own_redis, tmp_path, METERFALL_SERVE_TIMEOUT_SECONDS="3") as (served, settings):
        give_account(settings, USER, "basic")
        person = Person(served.port)
        person.sign_in(served.secrets["operator"])
        assert person.get(f"/console/account?user_id={USER}").status == 200
        own_postgres.freeze()
        own_redis.freeze()
        wait_until(lambda: "did not answer in time" in person.get("/console/").text, "it tells", seconds=15)
        page = person.get("/console/")
        assert page.status == 200
        assert "This is the state of" in page.text
        began = monotonic()
        late = person.get(f"/console/account?user_id={USER}")
        assert late.status == 503
        assert monotonic() - began < 8


def test_a_form_that_is_too_large_or_cut_off_is_answered_with_a_page(
    own_postgres: Server, own_redis: Server, tmp_path: Path
) -> None:
    with serving_on(own_postgres, own_redis, tmp_path, METERFALL_SERVE_BODY_MAX_BYTES="1024") as (served, _):
        large = Person(served.port).ask("POST", "/console/sign-in", {"key": "x" * 2_000})
        assert (large.status, "too large" in large.text) == (413, True)
