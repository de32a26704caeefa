"""API keys: minting, parsing, hashing. `tut_<env>_<id>_<secret>_<crc>`; only a keyed hash of the secret is ever stored.

Pure functions of their arguments; it refuses to know where keys are kept.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass
from datetime import datetime

from tutelage.errors import Unauthenticated
from tutelage.records import Key

SHAPE = re.compile(r"^(tut_([a-z]{2,8})_([0-9a-f]{12})_([0-9a-f]{48}))_([0-9a-f]{8})$")


@dataclass(frozen=True)
class Minted:
    """A new key: `text` is shown once and never stored."""

    id: str
    text: str
    hash: bytes


@dataclass(frozen=True)
class Presented:
    """A key whose checksum holds; nothing has been looked up yet."""

    id: str
    secret: str


def mint(pepper: str, *, environment: str = "live") -> Minted:
    key_id, secret = secrets.token_hex(6), secrets.token_hex(24)
    body = f"tut_{environment}_{key_id}_{secret}"
    return Minted(key_id, f"{body}_{_checksum(body)}", digest(pepper, secret))


def digest(pepper: str, secret: str) -> bytes:
    """HMAC-SHA-256; the secret has 192 random bits, so no slow derivation is needed."""
    return hmac.new(pepper.encode(), secret.encode(), hashlib.sha256).digest()


def parse(header: str | None) -> Presented:
    """The key in an `Authorization: Bearer …` header.

    Raises:
        Unauthenticated: no header, another scheme, or a key with a wrong shape or checksum (refused before any lookup).
    """
    scheme, _, text = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Unauthenticated("no API key; send the header Authorization: Bearer tut_…")
    match = SHAPE.match(text.strip())
    if match is None or not hmac.compare_digest(_checksum(match[1]), match[5]):
        raise Unauthenticated("this is not a well-formed API key (checksum does not hold); copy the whole key, tut_… to its end")
    return Presented(match[3], match[4])


def check(presented: Presented, stored: Key | None, *, pepper: str, now: datetime) -> Key:
    """The stored key if the presented one opens it now. Unknown, wrong, expired and revoked look the same to a stranger.

    Raises:
        Unauthenticated: it does not.
    """
    expected = stored.hash if stored else b"\0" * 32
    same = hmac.compare_digest(digest(pepper, presented.secret), expected)
    if stored is None or not same:
        raise Unauthenticated("unknown API key; ask your administrator for a valid one")
    if stored.revoked_at is not None:  # whatever this machine's clock says of the time
        raise Unauthenticated("this API key was revoked; ask your administrator for a new one")
    if stored.expires_at is not None and stored.expires_at <= now:
        raise Unauthenticated("this API key has expired; ask your administrator for a new one")
    return stored


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
