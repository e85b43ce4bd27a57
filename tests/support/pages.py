"""A person at the console, without a browser: follows links, fills forms, keeps the cookie."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode


@dataclass
class Form:
    """A form of a page: where it goes, and what it says."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Page:
    """A page that arrived whole; `text` is what a person reads."""

    status: int
    headers: Mapping[str, str]
    html: str
    path: str
    text: str = ""
    forms: list[Form] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)

    def form(self, action: str) -> Form:
        """The form that goes to an address with this beginning."""
        return next(each for each in self.forms if each.action.startswith(action))


class _Reader(HTMLParser):
    """Reads links and forms of a page, and refuses what our content policy forbids."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page
        self._select: str | None = None
        self._link: str | None = None
        self._words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert tag not in {"script", "style"}, "the content policy forbids it"
        assert not any(name == "style" or name.startswith("on") for name in found), (tag, found)
        if tag == "form":
            self._page.forms.append(Form(found["action"]))
        elif tag == "input" and self._page.forms and "name" in found:
            self._page.forms[-1].fields[found["name"]] = found.get("value", "")
        elif tag == "button" and "name" in found:
            self._page.forms[-1].buttons.append((found["name"], found["value"]))
        elif tag == "select":
            self._select = found["name"]
        elif tag == "option" and self._select is not None:
            fields = self._page.forms[-1].fields
            if self._select not in fields or "selected" in found:
                fields[self._select] = found["value"]
        elif tag == "a":
            self._link = found["href"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "select":
            self._select = None
        elif tag == "a":
            self._link = None

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if self._link is not None:
            self._page.links.setdefault(words, self._link)
        if words:
            self._words.append(words)

    def close(self) -> None:
        super().close()
        self._page.text = " ".join(self._words)


class Person:
    """Somebody with a cookie jar of one cookie."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.host = host
        self.cookie = ""
        self.set_cookie = ""

    def ask(
        self,
        method: str,
        path: str,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Page:
        """Send one request, with fields of a form or a body; follow no redirection."""
        sent = {"Host": f"{self.host}:{self.port}", **(headers or {})}
        if self.cookie:
            sent["Cookie"] = self.cookie
        data = body
        if fields is not None:
            data = urlencode(fields).encode()
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            html = answer.read().decode()
        finally:
            connection.close()
        if "set-cookie" in named:
            self.set_cookie = named["set-cookie"]
            self.cookie = self.set_cookie.partition(";")[0]
        page = Page(answer.status, named, html, path)
        assert "Traceback" not in html
        if "text/html" in named.get("content-type", ""):
            policy = named["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            reader = _Reader(page)
            reader.feed(html)
            reader.close()
        return page

    def get(self, path: str) -> Page:
        """Load a page, and go where it leads."""
        page = self.ask("GET", path)
        return self._led(page)

    def send(self, form: Form, **fields: str) -> Page:
        """Fill in a form and send it; go where the answer leads."""
        return self._led(self.ask("POST", form.action, form.fields | fields))

    def sign_in(self, secret: str) -> Page:
        """Sign in with an API key."""
        return self.send(self.get("/console/sign-in").form("/console/sign-in"), key=secret)

    def _led(self, page: Page) -> Page:
        for _ in range(3):
            if page.status not in {303, 308}:
                return page
            page = self.ask("GET", page.headers["location"])
        raise AssertionError(f"led in a circle: {page.path}")
