"""A service that tests/client/test_fastapi.py runs in uvicorn: `plain` streams with the client alone, the rest with
`meterfall.contrib.fastapi`.

It notes each piece of work in the file `JOURNAL` right before its settle, and after it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.params import Depends
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.middleware.base import BaseHTTPMiddleware

from worker.client import AsyncBilling
from worker.contrib.fastapi import BilledResponse, Work, add_error_handlers, billing_of, lifespan, reserved
from worker.errors import ClientBusy, EventConflict, LedgerUnavailable, RedisUnavailable, SpoolUnavailable, WrongRedis

METER, HELD, CHUNKS, CHUNK_UNITS = "premium_voice", 1_000, 20, 50
PAUSE_SECONDS = 0.005
UNITS = CHUNKS * CHUNK_UNITS

app = FastAPI(lifespan=lifespan())
add_error_handlers(app)
if "MIDDLEWARE" in os.environ:
    # It runs each request in a task group, and cancels all of it when the client hangs up.
    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
Billing = Annotated[AsyncBilling, Depends(billing_of)]
_journal = os.open(os.environ.get("JOURNAL", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(*words: object) -> None:
    """Write one line; it is there if the process is killed right after."""
    os.write(_journal, (" ".join(map(str, words)) + "\n").encode())


@app.get("/plain/{user_id}/{key}")
async def plain(billing: Billing, user_id: str, key: str, chunk_bytes: int = CHUNK_UNITS) -> StreamingResponse:
    async def stream() -> AsyncIterator[bytes]:
        async with billing.reserve(user_id, METER, HELD, key=key) as hold:
            produced = 0
            try:
                for _ in range(CHUNKS):
                    await asyncio.sleep(PAUSE_SECONDS)
                    produced += CHUNK_UNITS
                    yield b"x" * chunk_bytes
            finally:
                if produced:
                    note("settles", key, produced)
                    await hold.settle(produced)
                    note("settled", key, produced)

    return StreamingResponse(stream())


def user_of(user_id: str) -> str:
    return user_id


async def key_of(request: Request) -> str:
    return str(request.path_params["key"])


Speaking = Annotated[Work, reserved(meter=METER, user=user_of, amount=HELD, key=key_of, source="tts")]


@app.get("/billed/{user_id}/{key}")
async def billed(
    work: Speaking, key: str, chunk_bytes: int = CHUNK_UNITS, pause_seconds: float = PAUSE_SECONDS
) -> BilledResponse:
    async def produce() -> AsyncIterator[bytes]:
        try:
            for _ in range(CHUNKS):
                await asyncio.sleep(pause_seconds)
                yield b"x" * chunk_bytes
        finally:
            if work.units:
                note("settles", key, work.units)

    work.dimensions["voice_slug"] = "narrator"
    return BilledResponse(work, produce(), units=lambda _: CHUNK_UNITS, media_type="audio/mpeg")


@app.get("/lines/{user_id}/{key}")
def lines(work: Speaking) -> BilledResponse:
    """A producer that waits, in a thread, and counts by itself."""

    def produce() -> Any:
        for number in range(3):
            work.add(10)
            yield f"line {number}\n"

    return BilledResponse(work, produce(), media_type="text/plain")


def model_of(model_slug: str) -> str:
    return model_slug


@app.get("/modelled/{user_id}/{key}")
async def modelled(
    work: Annotated[
        Work,
        reserved(
            meter=METER, user=user_of, quantity=HELD, model_slug=model_of, key=key_of, ttl_seconds=1, keep_alive=True
        ),
    ],
) -> dict[str, Any]:
    """Takes longer than its hold lives, which is renewed."""
    await asyncio.sleep(2)
    work.add(100)
    return work.hold.answer.model_dump(mode="json")


class Page(BaseModel):
    text: str
    fail: bool = False


def letters(page: Page) -> int:
    return len(page.text)


Reading = Annotated[Work, reserved(meter="ocr_tokens", user=user_of, amount=letters, key=key_of)]


@app.post("/pages/{user_id}/{key}")
async def pages(page: Page, work: Reading) -> dict[str, Any]:
    if page.text.strip():
        work.add(len(page.text.strip()))
    if page.fail:
        raise HTTPException(418, "the page is a teapot")
    return {"words": len(page.text.split())}


@app.get("/lost/{user_id}/{key}")
async def lost(work: Speaking, key: str) -> BilledResponse:
    """Fails after it has made a response, before anything streams."""
    BilledResponse(work, iter([b"never sent"]))
    raise HTTPException(500, "changed its mind")


@app.get("/errors/{name}")
async def errors(name: str) -> None:
    raise {
        "busy": ClientBusy("all 64 connections of this process are in use"),
        "redis": RedisUnavailable("Error 111 connecting to redis.internal:6379"),
        "ledger": LedgerUnavailable("postgresql://meterfall:secret@db"),
        "spool": SpoolUnavailable("/var/spool/meterfall", "full"),
        "conflict": EventConflict("alice", "job-1", 5),
        "wrong": WrongRedis("invalid password"),
    }[name]
