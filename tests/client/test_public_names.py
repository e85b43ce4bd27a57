"""The wheel's public names are the clients, their errors and their answers: all of them."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import pytest

import schemas.answers
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
        classes_of(schemas.answers),
        # Only intake, which is not in the wheel, raises and catches `Rejected`.
        classes_of(worker.errors) - {"Rejected"},
    ],
    ids=["clients", "answers", "errors"],
)
def test_the_public_names_include(names: set[str]) -> None:
    assert names <= set(public.__all__)


def test_the_public_names_exist() -> None:
    assert all(hasattr(public, name) for name in public.__all__)


@pytest.mark.parametrize("client", [public.Billing, public.AsyncBilling, public.Hold, public.AsyncHold])
def test_whatever_a_caller_passes_has_a_public_name(client: type) -> None:
    passed: set[str] = set()
    for name, method in inspect.getmembers(client, callable):
        # `run` carries out the effects of an operation, which no service has in hand.
        if name == "__init__" or not name.startswith(("_", "run")):
            _, *parameters = inspect.signature(method).parameters.values()
            passed |= {word for each in parameters for word in re.findall(r"\b[A-Z]\w+", str(each.annotation))}
    passed -= {"Iterable", "Mapping", "None", "Scalar"}
    assert passed
    assert passed <= set(public.__all__)
