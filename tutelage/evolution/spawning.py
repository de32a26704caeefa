"""What a student is called. Pure; a student's name is also its MLflow model's and its Bento's."""

from __future__ import annotations

import hashlib
import re


def student_name(tenant: str, domain: str) -> str:
    """`<tenant>-<domain>` in lower-case letters, digits and dashes; a short hash keeps apart names that spell alike.

    >>> student_name("acme", "chain-sum")
    'acme-chain-sum'
    >>> student_name("Acme Ltd.", "chain-sum").startswith("acme-ltd-chain-sum-")
    True
    """
    plain = f"{tenant}-{domain}"
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:48] or "student"
    return slug if slug == plain else f"{slug}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"
