"""Methods made of operations: the same parameters, carried out by waiting or by awaiting."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine
from functools import partial, update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from worker.client.effects import Effects, T
from worker.client.session import Running, UndoAll

C = TypeVar("C", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")

# The answer in the annotation of an operation.
_ANSWER = re.compile(r"Effects\[(.*)\]")


class _Blocking(Protocol[C]):
    """Something that carries out steps by waiting."""

    @property
    def _context(self) -> C: ...

    def _run(self, steps: Effects[T]) -> T: ...


class _Awaiting(Protocol[C]):
    """Something that carries out steps by awaiting."""

    @property
    def _context(self) -> C: ...

    async def _run(self, steps: Effects[T], *, undo: UndoAll | None = None, may_leave: bool = False) -> T: ...


def blocking(operation: Callable[Concatenate[C, P], Effects[T]]) -> Callable[Concatenate[_Blocking[C], P], T]:
    """Make a method that carries out `operation` by waiting."""

    @as_method(operation)
    def method(self: _Blocking[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(operation(self._context, *args, **kwargs))

    return method


def awaiting(
    operation: Callable[Concatenate[C, P], Effects[T]],
    *,
    undo: Callable[[C, Running[Any]], Effects[Any] | None] | None = None,
    may_leave: bool = False,
) -> Callable[Concatenate[_Awaiting[C], P], Coroutine[Any, Any, T]]:
    """Make a method that carries out `operation` by awaiting.

    If its caller is cancelled, `undo` makes the steps that undo an operation whose answer nobody received. The
    caller waits for that, unless it `may_leave`: where the operation changes nothing.
    """

    @as_method(operation)
    async def method(self: _Awaiting[C], /, *args: P.args, **kwargs: P.kwargs) -> T:
        context = self._context
        undone = None if undo is None else partial(undo, context)
        return await self._run(operation(context, *args, **kwargs), undo=undone, may_leave=may_leave)

    return method


def as_method(operation: Callable[..., Any], answer: str | None = None) -> Callable[[F], F]:
    """Show a method as what it is for its callers: with `self` instead of a context, and with its answer.

    Without `answer` that is the one of the operation.
    """

    def shown(method: F) -> F:
        update_wrapper(method, operation)
        del method.__wrapped__  # type: ignore[attr-defined]
        _, *parameters = inspect.signature(operation).parameters.values()
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        returned = answer or _ANSWER.sub(r"\1", str(operation.__annotations__["return"]))
        signature = inspect.Signature([self, *parameters], return_annotation=returned)
        method.__signature__ = signature  # type: ignore[attr-defined]
        method.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": returned}
        return method

    return shown
