"""CSV: whatever is in a cell comes back as it was, and no spreadsheet runs it."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage import sheets


@pytest.mark.parametrize(
    "formula",
    ['=HYPERLINK("http://x","y")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "|cmd", "%0A=1", "＝1+1", "\ufeff=1"],
)
def test_what_a_spreadsheet_would_run_is_text(formula: str) -> None:
    (row,) = csv.reader(io.StringIO(sheets.line(["acme", formula, -5]), newline=""))
    assert row == ["acme", f"'{formula}", "-5"]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.integers(), min_size=1))
def test_any_row_is_read_back_as_it_was_and_no_text_begins_a_formula(values: list[str | int]) -> None:
    (row,) = csv.reader(io.StringIO(sheets.line(values), newline=""))
    for cell, value in zip(row, values, strict=True):
        assert cell in (str(value), f"'{value}")
        if isinstance(value, str):
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_nothing_is_an_empty_cell() -> None:
    assert sheets.line([None, "", 0]) == ",,0\r\n"
