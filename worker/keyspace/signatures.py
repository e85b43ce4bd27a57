"""Signatures: proof that an event's bytes come from a holder of a key.

The field `s` of a stream entry is `key_id:hex`, the HMAC-SHA256 over the bytes of the field `e`. Pure: no I/O; the time
of the entry counts. No secret leaves this file. The reasons of refusals tell a producer that forgot to sign from a
forger.
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
        # Keyed already: a copy of it costs half as much as a new one.
        self._keyed = hmac.new(key.secret.get_secret_value().encode(), digestmod="sha256")

    def sign(self, payload: bytes) -> str:
        """Return the field `s` for a field `e` with these bytes."""
        return f"{self.key_id}:{self.digest(payload)}"

    def digest(self, payload: bytes) -> str:
        """Return the HMAC-SHA256 of these bytes in hexadecimal."""
        keyed = self._keyed.copy()
        keyed.update(payload)
        return keyed.hexdigest()


def signer_of(settings: Settings) -> Signer | None:
    """Return the signer of a process that writes events, with the first of its keys; None without a key."""
    return Signer(settings.signing_keys[0]) if settings.signing_keys else None


class SignatureCheck:
    """Checks signatures of stream entries, by the keys and the mode of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.is_on = settings.signatures != "off"
        self._is_required = settings.signatures == "required"
        self._signers: Mapping[bytes, Signer] = {key.key_id.encode(): Signer(key) for key in settings.signing_keys}

    def signed_by(self, payload: bytes, signature: bytes | None, entry_ms: int) -> str | None:
        """Return the id of the key that signed `payload`; None without a signature if none is required.

        `entry_ms` is the time of the stream entry, in milliseconds on the clock of Redis: a key that has ended since
        then still counts. Raises Rejected.
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
    """Return the error of a wrong signature; `signer` has the key that it names, None if unknown."""
    if not _is_signature(signature):
        return Rejected(Refusal.BAD_SIGNATURE, "field s: must be a key's id, a colon and 64 digits 0-9a-f")
    if signer is None:
        key_id = signature.partition(b":")[0].decode("ascii")
        return Rejected(Refusal.UNKNOWN_KEY, f"field s: there is no key {key_id}")
    return Rejected(Refusal.BAD_SIGNATURE, f"field s: not what key {signer.key_id} makes of field e")
