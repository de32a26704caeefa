"""Rows as CSV that a spreadsheet opens as text and numbers, never as formulas. It refuses to know what the rows mean."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

# what Excel, LibreOffice and Google Sheets take for a formula (OWASP, "CSV Injection"), their full-width forms included
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "＝", "＋", "－", "＠")


def header(names: Sequence[str]) -> str:
    return _line(names)


def line(values: Sequence[Any]) -> str:
    """One row. Text that a spreadsheet would run gets an apostrophe before it; None is an empty cell."""
    return _line([_cell(value) for value in values])


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # a number below zero is a number
    return f"'{value}" if value.lstrip(" \ufeff\u00a0").startswith(FORMULA) else value


def _line(values: Sequence[Any]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\r\n").writerow(values)  # RFC 4180
    return written.getvalue()
