"""Templates, and texts for people: numbers grouped, times relative with the instant in `title`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from worker.rules import formats
from worker.rules.api_keys import Right
from worker.rules.words import counted

if TYPE_CHECKING:
    from worker.service.console.visit import Visit

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    )
}


def when(moment: datetime | None, now: datetime) -> Markup:
    """Return a time as its distance from `now`; the instant is in its title."""
    if moment is None:
        return Markup("never")
    seconds = (moment - now).total_seconds()
    text = f"in {formats.age(seconds)}" if seconds > 0 else f"{formats.age(-seconds)} ago"
    told = formats.moment(moment)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(), told, text)


def signed(number: int) -> str:
    """Return a change with its sign: `+1,234`, `−5`, `0`."""
    return f"{number:+,}".replace("-", "−") if number else "0"


def units(number: int | None) -> str:
    """Return a number of units, `unlimited` for None."""
    return "unlimited" if number is None else f"{number:,}".replace("-", "−")


def link(path: str, **query: object) -> str:
    """Return the address of a page with its query, as parts that are None are left out."""
    parts = {name: value for name, value in query.items() if value is not None}
    return f"/console/{path}" + (f"?{urlencode(parts)}" if parts else "")


_templates = Environment(
    loader=PackageLoader("worker.service.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "age": formats.age, "memory": formats.memory, "rate": formats.rate, "units": units, "signed": signed,
    "when": when, "words": lambda text: str(text).replace("_", " "), "counted": counted,
}  # fmt: skip
_templates.globals |= {"link": link, "Right": Right}


def page(visit: Visit, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page for a person who signed in."""
    return _answer(template, status, values | {"visit": visit, "token": visit.token})


def plain_page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page that needs no session."""
    return _answer(template, status, values | {"visit": None})


def error_page(status: int, title: str, text: str) -> HTMLResponse:
    """Return the page of a request that failed."""
    return plain_page("error.html", status, title=title, text=text)


def _answer(template: str, status: int, values: dict[str, Any]) -> HTMLResponse:
    text = _templates.get_template(template).render(values | {"now": datetime.now(UTC)})
    return HTMLResponse(text, status, HEADERS)
