"""Names of requests: never the same twice, and growing with time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tutelage.records import new_id

MOMENTS = st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2999, 1, 1), timezones=st.just(UTC))


@given(MOMENTS, st.timedeltas(min_value=timedelta(milliseconds=2), max_value=timedelta(days=9999)))
def test_a_later_request_has_the_greater_name(moment: datetime, later: timedelta) -> None:
    assert new_id("chatcmpl", moment) < new_id("chatcmpl", moment + later)


@given(MOMENTS)
def test_requests_of_one_moment_have_different_names_of_one_form(moment: datetime) -> None:
    names = {new_id("embd", moment) for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch("embd-[0-9a-f]{32}", name) for name in names)
