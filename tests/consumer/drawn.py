"""Events and stream entries drawn by hypothesis: valid but for a few of their parts, spelled in every way."""

from __future__ import annotations

import json
from datetime import timedelta

from hypothesis import strategies as st

from tests.support.entries import ENTERED

RECENT = st.datetimes(
    (ENTERED - timedelta(days=36)).replace(tzinfo=None), (ENTERED + timedelta(minutes=10)).replace(tzinfo=None)
).map(lambda moment: moment.isoformat(timespec="seconds"))
TIMES = st.one_of(
    RECENT.map("{}Z".format),
    st.builds(
        "{}{}{}".format,
        RECENT,
        st.just("") | st.from_regex(r"[.,][0-9]{1,12}", fullmatch=True),
        st.sampled_from(
            ["Z", "z", "+00:00", "-00:00", "+05:30", "-11:00", "+0100", "+23:59", "-24:00", "+1", "", " Z"]
        ),
    ),
    st.builds(
        "{}{}{:02}:{:02}:{:02}Z".format,
        st.dates() | st.just(ENTERED.date() - timedelta(days=1)),
        st.sampled_from(["T", "t", " ", "_"]),
        st.integers(0, 24),
        st.integers(0, 60),
        st.integers(0, 61),
    ),
    st.sampled_from(["1763632800", "2026-11-20", "", "now", "2026-11-20T10:00Z", "2026-W47-5T10:00:00Z"]),
).map(json.dumps)
NUMBERS = st.one_of(
    st.integers(-2, 10**13).map(str),
    st.integers(0, 10**12).map(str),
    st.integers().map(str),
    st.floats(allow_nan=True).map(str),
    st.from_regex(r"-?(0|[1-9][0-9]{0,3})(\.[0-9]{1,3})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["-0", "01", "+1", "1.", ".5", "1e400", "1e-400", "NaN", "0x1", "9" * 30, str(2**63), str(2**64)]),
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "m2", "a" * 256, "a" * 257, "\x00", "\x7f", "\u202e", '":', "a:b", "\u00a0"]
)


@st.composite
def json_text(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> str:
    """A JSON string, spelled in one of the ways there are."""
    value = draw(texts)
    return draw(
        st.sampled_from(
            [
                json.dumps(value, ensure_ascii=False),
                json.dumps(value, ensure_ascii=False),
                json.dumps(value),
                '"'
                + "".join(rf"\u{ord(character):04x}" if ord(character) < 0x10000 else "" for character in value)
                + '"',
                '"' + value + '"',
            ]
        )
    )


BLANKS = st.sampled_from(["", "", "", "", " ", "\n", "\t", "\r\n"])
IDS = st.from_regex(r"[A-Za-z0-9._:@|+=/-]{1,20}", fullmatch=True) | TEXTS
SCALARS = st.one_of(NUMBERS, json_text(), st.sampled_from(["true", "false", "null", "[]", "{}", "[1]"]))


@st.composite
def json_object(draw: st.DrawFn, members: st.SearchStrategy[list[tuple[str, str]]]) -> str:
    """A JSON object of ready-made members, with blanks wherever they may stand."""
    gaps = draw(st.sampled_from([("", "", ",", ":"), (" ", " ", ", ", ": "), ("", "", ",", ":"), None]))
    parts = draw(members)
    if gaps is not None:
        opening, closing, comma, colon = gaps
        return "{" + opening + comma.join(f"{key}{colon}{value}" for key, value in parts) + closing + "}"
    spaced = (f"{draw(BLANKS)}{key}{draw(BLANKS)}:{draw(BLANKS)}{value}{draw(BLANKS)}" for key, value in parts)
    return "{" + ",".join(spaced) + "}"


DIMENSIONS = json_object(
    st.lists(st.tuples(json_text(st.sampled_from(["model_slug", "a", "b", "é", ""]) | TEXTS), SCALARS), max_size=4)
)
MULTIPLIERS = json_text(st.sampled_from(["1", "1.5", "1.50", "0", "0.333333", "999999.999999", "01", "1e3", "-1", ""]))
REQUIRED = {
    "event_id": json_text(IDS),
    "user_id": json_text(IDS),
    "meter": json_text(st.sampled_from(["credits", "premium_voice", "tea", "Credits"])),
    "quantity": NUMBERS,
}
OPTIONAL = {
    "multiplier": MULTIPLIERS,
    "occurred_at": TIMES,
    "source": json_text(),
    "reference_id": json_text(),
    "hold_key": json_text(IDS),
    "dimensions": DIMENSIONS,
}
PLAIN_ID = st.from_regex(r"[A-Za-z0-9._:@|+=/-]{1,20}", fullmatch=True).map(json.dumps)
PLAIN_SCALAR = st.one_of(
    NUMBERS,
    st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.sampled_from(["true", "null"]),
)
PLAIN_SPELLINGS = {
    "event_id": PLAIN_ID,
    "user_id": PLAIN_ID,
    "meter": st.just('"credits"'),
    "quantity": st.integers(0, 10**6).map(str),
    "multiplier": st.sampled_from(['"1"', '"1.50"', '"0.333333"']),
    "occurred_at": st.builds(
        '"{}{}{}"'.format,
        RECENT,
        st.just("") | st.from_regex(r"\.[0-9]{1,9}", fullmatch=True),
        st.sampled_from(["Z", "+05:30"]),
    ),
    "source": st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False)),
    "reference_id": st.just('"variant:1"'),
    "hold_key": PLAIN_ID,
    "dimensions": st.dictionaries(st.sampled_from(["model_slug", "a", "é", ""]), PLAIN_SCALAR, max_size=3).map(
        lambda facts: (
            "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{value}" for key, value in facts.items()) + "}"
        )
    ),
}


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """Bytes of an event: valid but for at most a few of its parts, so that each rule gets its turn."""
    optional = draw(st.lists(st.sampled_from(sorted(OPTIONAL)), unique=True))
    spoiled = draw(st.just([]) | st.lists(st.sampled_from([*REQUIRED, *optional]), max_size=2))
    anything = REQUIRED | OPTIONAL
    members = [
        (name, draw(anything[name] if name in spoiled else PLAIN_SPELLINGS[name])) for name in [*REQUIRED, *optional]
    ]
    if draw(st.integers(0, 4)) == 4:
        members.append((draw(st.sampled_from([*anything, "extra"])), draw(SCALARS)))
    keyed = [(json.dumps(name), value) for name, value in draw(st.permutations(members))]
    return draw(json_object(st.just(keyed))).encode("utf-8", "surrogatepass")


FIELD_NAMES = st.sampled_from([b"v", b"e", b"s", b"m", b"r"]) | st.binary(max_size=4)
VALUES = st.one_of(
    st.binary(max_size=64),
    events(),
    st.just(b"1"),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
FIELDS = st.lists(st.tuples(FIELD_NAMES, VALUES), max_size=4).map(
    lambda pairs: [b"v", b"1", *(part for pair in pairs for part in pair)]
)
