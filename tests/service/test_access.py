"""Who may ask what: no key, a wrong one, one that is over, and the wrong role; and the table that says so."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from config.settings import Settings
from schemas.codes import Role
from tests.support.resources import settings_for, worker_resources
from tests.support.serving import Served
from tests.support.waiting import wait_until
from worker.admin import api_keys
from worker.rules.api_keys import RIGHTS
from worker.service.access import OPERATIONS, GuardedRoute
from worker.service.app import make_app

CHECK = {"user_id": "user-42", "meter": "premium_voice"}


def test_every_operation_wants_a_key(served: Served) -> None:
    for each in OPERATIONS:
        # The body is not even read: it is wrong.
        answer = served.ask(each.method, each.path, b"{" if each.method == "POST" else None, role=None)
        assert answer.status == 401, each
        assert answer.problem["reason"] == "missing"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_does_what_its_role_may_and_nothing_else(served: Served) -> None:
    for role in Role:
        for each in OPERATIONS:
            answer = served.ask(each.method, each.path, b"{" if each.method == "POST" else None, role)
            if RIGHTS[role].isdisjoint(each.rights):
                assert (answer.status, answer.problem["reason"]) == (403, "wrong_role"), (role, each)
            else:
                assert answer.status in {200, 415, 422}, (role, each)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "missing"),
        ("Basic dXNlcjpwYXNz", "missing"),
        ("Bearer", "missing"),
        ("Bearer x", "malformed"),
        ("Bearer mf_000000000000_" + "A" * 43, "unknown"),
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(served: Served, header: str, reason: str) -> None:
    answer = served.ask("POST", "/v1/check", CHECK, None, {"Authorization": header})
    assert (answer.status, answer.problem["reason"]) == (401, reason)
    assert "A" * 43 not in answer.body.decode() + served.logged()


def test_a_revoked_and_an_expired_key_are_over(served: Served, settings: Settings) -> None:
    with worker_resources(settings) as resources:
        short = api_keys.add(
            resources, "short", Role.PRODUCER, expires_at=datetime.now(UTC) + timedelta(seconds=2), actor="tests"
        )
        assert served.post("/v1/check", CHECK, short.secret).status == 200
        wait_until(lambda: served.post("/v1/check", CHECK, short.secret).status == 401, "the key expires")
        assert served.post("/v1/check", CHECK, short.secret).problem["reason"] == "expired"
        api_keys.revoke(resources, "the-producer", actor="tests")
    wait_until(lambda: served.post("/v1/check", CHECK).status == 401, "the key is revoked", seconds=15)
    assert served.post("/v1/check", CHECK).problem["reason"] == "revoked"


def test_a_scheme_in_other_letters_and_no_secret_in_the_query(served: Served) -> None:
    secret = served.secrets["producer"]
    assert served.ask("POST", "/v1/check", CHECK, None, {"Authorization": f"bEARER {secret}"}).status == 200
    assert served.ask("POST", f"/v1/check?access_token={secret}", CHECK, None).status == 401


def test_a_path_without_an_operation_cannot_be_served() -> None:
    app = make_app(settings_for("postgresql://h/d", "redis://h/0"))
    with pytest.raises(KeyError):
        app.add_api_route("/v1/unguarded", OPERATIONS[0].call, methods=["POST"])
    guarded = {(next(iter(each.methods or ())), each.path) for each in app.routes if isinstance(each, GuardedRoute)}
    assert guarded == {(each.method, each.path) for each in OPERATIONS}
    assert all(each.path.startswith("/v1/") and each.rights for each in OPERATIONS)
