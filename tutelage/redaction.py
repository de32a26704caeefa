"""Personal data and credentials taken out of text before it is kept: e-mail, phone, card, IBAN, social security, IP address, API keys.

Patterns only propose; what has a check digit or a numbering plan is verified by libraries (python-stdnum, phonenumbers), so that sums and
dates survive. Names and addresses of people are not found. It refuses to know who keeps the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import phonenumbers
from stdnum import iban, luhn
from stdnum.exceptions import ValidationError
from stdnum.us import ssn

CANDIDATES = re.compile(
    r"""
    (?P<secret> \b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,} | \btut_[a-z]{2,8}_[0-9a-f]{12}_[0-9a-f_]+ | \bAKIA[0-9A-Z]{16}\b
        | \bgh[pousr]_[A-Za-z0-9]{30,} | \bxox[abprs]-[A-Za-z0-9-]{10,} | \beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}
        | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z) )
  | (?P<email> \b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b )
  | (?P<iban> \b[A-Z]{2}\d{2}(?:\ ?[A-Z0-9]{4}){2,7}(?:\ ?[A-Z0-9]{1,3})?\b )
  | (?P<ip> (?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d) | (?<![\w:])(?:[0-9A-Fa-f]{1,4}:){2,7}:?[0-9A-Fa-f]{0,4}(?![\w:]) )
  | (?P<ssn> \b\d{3}-\d{2}-\d{4}\b )
  | (?P<card> \b\d(?:[ -]?\d){12,18}\b )
  | (?P<phone> (?<![\w.,/])(?:\+\d|\(\d|\d)[\d ().\-/]{6,18}\d(?![\w]) )
    """,
    re.VERBOSE | re.DOTALL,
)
FORMATTED = re.compile(r"\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}")


def redact(text: str) -> str:
    """The text with `[email]`, `[phone]` and so on in place of what was found."""
    return CANDIDATES.sub(_replace, text)


def redact_all(value: Any) -> Any:
    """Every string inside a JSON value; keys of objects stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redact_all(part) for part in value]
    if isinstance(value, dict):
        return {key: redact_all(part) for key, part in value.items()}
    return value


def _replace(found: re.Match[str]) -> str:
    kind, text = str(found.lastgroup), found[0]
    verified = VERIFIED.get(kind)
    return f"[{kind}]" if verified is None or verified(text) else text


def _is_iban(text: str) -> bool:
    return bool(iban.is_valid(text))


def _is_card(text: str) -> bool:
    try:
        luhn.validate(re.sub(r"[ -]", "", text))
    except ValidationError:
        return False
    return True


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    """A number of a numbering plan: international as written, else one of North America, or what is written just like one."""
    if FORMATTED.fullmatch(text):
        return True
    if not text.startswith("+") and not re.search(r"[()\-. ]", text):
        return False
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, "US"))
    except phonenumbers.NumberParseException:
        return False


VERIFIED: dict[str, Callable[[str], bool]] = {
    "iban": _is_iban, "card": _is_card, "ip": _is_ip, "ssn": lambda text: bool(ssn.is_valid(text)), "phone": _is_phone,
}  # fmt: skip
