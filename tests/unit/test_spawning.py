"""Students' names, and their teachers."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.spawning import student_name, teachers_of
from tutelage.settings import ModelEntry


@given(st.text(max_size=80), st.text(max_size=80))
def test_every_name_is_one_that_mlflow_bentoml_and_a_folder_accept(tenant: str, domain: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", student_name(tenant, domain))


def test_tenants_that_spell_alike_get_different_students() -> None:
    assert len({student_name(t, "sums") for t in ("acme", "Acme", "acme ", "ACME.")}) == 4


def model(name: str, *domains: str, tier: str = "teacher") -> ModelEntry:
    return ModelEntry.model_validate({"name": name, "tier": tier, "kind": "openai", "base_url": "http://m", "domains": domains})


def test_a_domain_is_taught_by_those_that_name_it_and_else_by_those_that_answer_anything() -> None:
    models = [model("big"), model("mathematician", "sums", "dates"), model("small", "sums", tier="ta")]

    assert teachers_of("sums", models) == ("mathematician",)
    assert teachers_of("poems", models) == ("big",)
    assert teachers_of("poems", models, graduate="acme-poems") == ("acme-poems", "big")
    assert teachers_of("poems", []) == ()
