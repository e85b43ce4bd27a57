"""What editors, `help` and type checkers show of the client is what is called."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import Settings
from tests.client.clients import open_client
from tests.support.ledger import give_account
from tests.support.paths import ROOT
from tests.support.resources import settings_for
from worker.client import AsyncBilling, AsyncHold, Billing, Hold

CLIENTS = [Billing, AsyncBilling, Hold, AsyncHold]
HOST = """
import asyncio
from worker.client import AsyncBilling, AsyncHold, Billing, Hold
from schemas.answers import CheckAnswer, EventAnswer, HoldAnswer

def blocking(billing: Billing) -> int:
    answer: CheckAnswer = billing.check("u", "m", 5, backend="gemini")
    hold: Hold = billing.reserve("u", "m", 5, "k", ttl_seconds=30)
    with hold as same:
        event: EventAnswer = same.settle(3, dimensions={"voice": "narrator"})
    released: HoldAnswer = billing.release("u", "m", "k")
    return answer.requested + event.amount + released.amount

async def awaiting(billing: AsyncBilling) -> None:
    answer: CheckAnswer = await billing.check("u", "m", 5)
    task: asyncio.Task[AsyncHold] = asyncio.create_task(billing.reserve("u", "m", 5, "k"))
    async with await task as hold:
        event: EventAnswer = await hold.settle(3)
    async with billing.reserve("u", "m", 5, key="k") as other:
        await other.release()
    await asyncio.gather(*(asyncio.create_task(billing.emit("u", "m", 1)) for _ in range(2)))
"""
WRONG = """
# mypy: enable-error-code="unused-awaitable"
from worker.client import AsyncBilling, Billing

def wrong(billing: Billing) -> None:
    billing.check("u", "m", amount="five")  # expect: arg-type
    billing.check(context=1, user_id="u", meter="m")  # expect: call-arg
    billing.settle("u", "m")  # expect: call-arg

async def forgotten(billing: AsyncBilling) -> None:
    billing.emit("u", "m", 1)  # expect: unused-coroutine
    billing.reserve("u", "m", 5, "k")  # expect: unused-awaitable
"""


@pytest.mark.parametrize("client", CLIENTS)
def test_signatures_are_those_of_methods(client: type) -> None:
    shown = {name: inspect.signature(method) for name, method in inspect.getmembers(client, inspect.isfunction)}
    public = {name: signature for name, signature in shown.items() if not name.startswith("_")}
    assert public
    for name, signature in public.items():
        first, *rest = signature.parameters
        assert first == "self", name
        assert "context" not in rest, name
        assert "Effects" not in str(signature.return_annotation), name


def test_help_shows_them() -> None:
    text = pydoc.plain(pydoc.render_doc(Billing.settle))
    assert "settle(" in text
    assert "-> 'EventAnswer'" in text
    assert "context" not in text.split("\n\n")[1]
    assert "-> 'Hold'" in pydoc.plain(pydoc.render_doc(Billing.reserve))


def checked(code: str, folder: Path) -> list[str]:
    """What mypy says in its strict mode about the code of a host: numbers of lines and codes of errors."""
    source = folder / "host.py"
    source.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(source)]  # strict: pyproject.toml says so
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def test_a_strict_host_is_content(tmp_path: Path) -> None:
    assert checked(HOST, tmp_path) == []


def test_a_strict_host_is_told_its_mistakes(tmp_path: Path) -> None:
    expected = [
        (number, line.split("# expect: ")[1])
        for number, line in enumerate(WRONG.splitlines(), start=1)
        if "# expect: " in line
    ]
    found = checked(WRONG, tmp_path)
    assert [(int(line.split(":")[1]), line.rsplit("[", 1)[1].rstrip("]")) for line in found] == expected


@pytest.mark.parametrize("call", ["emit", "reserve"])
def test_python_warns_of_a_forgotten_await(call: str) -> None:
    billing = AsyncBilling.connect(settings_for(None, "redis://127.0.0.1:1/0"))
    with pytest.warns(RuntimeWarning, match=f"coroutine '{call}' was never awaited"):
        getattr(billing, call)("u", "m", 1)


@pytest.mark.parametrize("kind", ["blocking", "awaiting"])
def test_a_hold_shows_what_it_holds(kind: str, settings: Settings) -> None:
    give_account(settings, "user-1", "basic")
    billing = open_client(kind, settings)
    hold = billing.reserve("user-1", "premium_voice", 5, "job-1")
    target = getattr(hold, "_target", hold)
    name = "Hold" if kind == "blocking" else "AsyncHold"
    facts = "user_id='user-1', meter='premium_voice', key='job-1', amount=5, state='held'"
    assert repr(target) == f"<{name} {facts}>"
    hold.settle(3)
    assert repr(target) == f"<{name} {facts}, settle tried>"
    billing.close()


def test_a_client_shows_its_server_and_no_password() -> None:
    url = "redis://service:secret@127.0.0.1:1/0"
    with Billing.connect(settings_for(None, url)) as billing:
        assert repr(billing) == "<Billing redis://service@127.0.0.1:1/0>"
    assert repr(billing) == "<Billing redis://service@127.0.0.1:1/0 closed>"
    assert repr(AsyncBilling.connect(settings_for(None, url))) == "<AsyncBilling redis://service@127.0.0.1:1/0>"
