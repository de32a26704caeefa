"""What a student is called and who teaches it. Pure; a student's name is also its MLflow model's and its Bento's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from tutelage.settings import ModelEntry


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


def teachers_of(domain: str, models: Sequence[ModelEntry], *, graduate: str | None = None) -> tuple[str, ...]:
    """Who teaches a domain, the first choice first: its own student that rose to Teacher (`graduate`), models that name the domain, and
    where none does, those that answer anything."""
    teachers = [model for model in models if model.tier == "teacher"]
    own = [model.name for model in teachers if domain in model.domains]
    return (*([graduate] if graduate else []), *(own or [model.name for model in teachers if not model.domains]))
