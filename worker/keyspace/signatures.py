"""Signatures: proof that an event's bytes come from somebody who holds a key.

The field `s` of an entry is `key_id:hex`, the HMAC-SHA256 over the bytes of the field `e`. Pure: no I/O, and the time
that counts is the entry's. Secrets leave this file in no form; what is refused is told apart, so that a producer that
forgot to sign is not taken for a forger.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from config.settings import Settings, SigningKey
from schemas.events import SIGNATURE_PATTERN, Refusal
from worker.errors import Rejected

_is_signature = re.compile(SIGNATURE_PATTERN.encode()).fullmatch


class Signer:
    """Signs with one key. Safe to share between threads."""

    def __init__(self, key: SigningKey) -> None:
        self.key_id = key.key_id
        self.ends_ms = None if key.ends_at is None else int(key.ends_at.timestamp() * 1_000)
        # With the key taken in already: a copy of it costs half as much as a new one.
        self._keyed = hmac.new(key.secret.get_secret_value().encode(), digestmod="sha256")

    def sign(self, payload: bytes) -> str:
        """The field `s` for a field `e` with these bytes."""
        return f"{self.key_id}:{self.digest(payload)}"

    def digest(self, payload: bytes) -> str:
        """HMAC-SHA256 of these bytes, in hexadecimal."""
        keyed = self._keyed.copy()
        keyed.update(payload)
        return keyed.hexdigest()


def signer_of(settings: Settings) -> Signer | None:
    """The signer of a process that writes events: the first of its keys. None where it has none."""
    return Signer(settings.signing_keys[0]) if settings.signing_keys else None


class SignatureCheck:
    """Tells whose signature an entry bears, by the keys and the mode of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.is_on = settings.signatures != "off"
        self._is_required = settings.signatures == "required"
        self._signers: Mapping[bytes, Signer] = {key.key_id.encode(): Signer(key) for key in settings.signing_keys}

    def signed_by(self, payload: bytes, signature: bytes | None, entry_ms: int) -> str | None:
        """Id of the key that signed `payload`; None for one that is not signed and need not be.

        `entry_ms` is when the entry was appended, in milliseconds by the clock of Redis: a key that has ended since
        still counts. Raises Rejected.
        """
        if signature is None:
            if self._is_required:
                raise Rejected(Refusal.MISSING_SIGNATURE, "field s: missing, and events must be signed")
            return None
        key_id, _, digest = signature.partition(b":")
        signer = self._signers.get(key_id)
        if signer is None or not hmac.compare_digest(signer.digest(payload).encode(), digest):
            raise _refused(signature, signer)
        if signer.ends_ms is not None and entry_ms >= signer.ends_ms:
            ended = datetime.fromtimestamp(signer.ends_ms / 1_000, UTC)
            raise Rejected(Refusal.EXPIRED_SIGNATURE, f"field s: key {signer.key_id} ended at {ended:%FT%TZ}")
        return signer.key_id


def _refused(signature: bytes, signer: Signer | None) -> Rejected:
    """What is wrong with a signature that is not the one of `signer`, if there is such a key."""
    if not _is_signature(signature):
        return Rejected(Refusal.BAD_SIGNATURE, "field s: must be a key's id, a colon and 64 digits 0-9a-f")
    if signer is None:
        key_id = signature.partition(b":")[0].decode("ascii")
        return Rejected(Refusal.UNKNOWN_KEY, f"field s: there is no key {key_id}")
    return Rejected(Refusal.BAD_SIGNATURE, f"field s: not what key {signer.key_id} makes of field e")
