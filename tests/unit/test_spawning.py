"""Students' names."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.spawning import student_name


@given(st.text(max_size=80), st.text(max_size=80))
def test_every_name_is_one_that_mlflow_bentoml_and_a_folder_accept(tenant: str, domain: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", student_name(tenant, domain))


def test_tenants_that_spell_alike_get_different_students() -> None:
    assert len({student_name(t, "sums") for t in ("acme", "Acme", "acme ", "ACME.")}) == 4
