"""The wheel's public names are the clients, their errors and their answers: all of them."""

from __future__ import annotations

import inspect
import re
import sys
from types import ModuleType

import pytest

import schemas.answers
import schemas.reports
import worker.accounts
import worker.client
import worker.errors
from distributions.client import public


def classes_of(module: ModuleType) -> set[str]:
    """Names of the classes that a module defines."""
    return {name for name, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__}


@pytest.mark.parametrize(
    "names",
    [
        set(worker.client.__all__),
        set(worker.accounts.__all__),
        classes_of(schemas.answers),
        classes_of(schemas.reports),
        # Only intake and the HTTP service, which are not in the wheel, raise and catch these.
        classes_of(worker.errors) - {"Rejected", "ApiKeyRefused"},
    ],
    ids=["clients", "accounts", "answers", "reports", "errors"],
)
def test_the_public_names_include(names: set[str]) -> None:
    assert names <= set(public.__all__)


def test_the_public_names_exist() -> None:
    assert all(hasattr(public, name) for name in public.__all__)


CLIENTS = [
    public.Billing, public.AsyncBilling, public.Hold, public.AsyncHold, public.Accounts, public.AsyncAccounts
]  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_whatever_a_caller_passes_has_a_public_name(client: type) -> None:
    passed: set[str] = set()
    for name, method in inspect.getmembers(client, callable):
        # `run` carries out the effects of an operation, which no service has in hand.
        if name == "__init__" or not name.startswith(("_", "run")):
            _, *parameters = inspect.signature(method).parameters.values()
            passed |= {word for each in parameters for word in re.findall(r"\b[A-Z]\w+", str(each.annotation))}
    passed -= {"Iterable", "Literal", "Mapping", "None", "Scalar", "Sequence"}
    assert passed
    assert passed <= set(public.__all__)


@pytest.mark.parametrize("client", [public.Accounts, public.AsyncAccounts])
def test_whatever_an_account_call_returns_has_a_public_name(client: type) -> None:
    methods = [method for name, method in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")]
    returned = {str(inspect.signature(method).return_annotation) for method in methods} - {"None", "str"}
    assert {"Account", "ChangeAnswer", "Timeline"} <= returned <= set(public.__all__)


def test_accounts_are_imported_only_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Accounts", "AsyncAccounts"):
        monkeypatch.delitem(vars(public), name, raising=False)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "worker.accounts", None)
            with pytest.raises(
                ImportError, match=rf"^{name} needs Postgres.*: pip install 'meterfall-client\[ledger\]'$"
            ):
                getattr(public, name)
        assert getattr(public, name) is getattr(worker.accounts, name)
    with pytest.raises(AttributeError, match="has no attribute 'Account5'"):
        _ = public.Account5  # type: ignore[attr-defined]
