"""Speech as a stream, billed by the character. README.md says how to run it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Header
from meterfall.contrib.fastapi import BilledResponse, Work, add_error_handlers, lifespan, reserved
from pydantic import BaseModel, Field

app = FastAPI(lifespan=lifespan())
add_error_handlers(app)

BYTES_PER_CHARACTER = 100


class Speech(BaseModel):
    """What to say, and in which voice."""

    text: str = Field(min_length=1, max_length=20_000)
    voice: str = "narrator"


def user_of(x_user: Annotated[str, Header()]) -> str:
    """Who pays. Yours comes from the session: a client must not be able to choose it."""
    return x_user


def job_of(idempotency_key: Annotated[str, Header()]) -> str:
    """Which job this is. A client that tries again sends the same key, and pays once."""
    return idempotency_key


def characters_of(speech: Speech) -> int:
    """Return the units that the job needs."""
    return len(speech.text)


Speaking = Annotated[
    Work, reserved(meter="premium_voice", user=user_of, key=job_of, amount=characters_of, source="tts")
]


@app.post("/speech")
async def speak(speech: Speech, work: Speaking) -> BilledResponse:
    """Stream the speech. A listener who hangs up pays for the sentences made until then."""
    work.dimensions["voice_slug"] = speech.voice
    return BilledResponse(work, synthesize(speech.text, work), media_type="audio/basic")


async def synthesize(text: str, work: Work) -> AsyncIterator[bytes]:
    """Stand in for an engine, which makes one sentence at a time."""
    for sentence in re.findall(r"[^.]+\.?|\.", text):
        await asyncio.sleep(len(sentence) / 10_000)
        work.add(len(sentence))
        yield b"\x7f" * len(sentence) * BYTES_PER_CHARACTER
