"""Which versions count when gaps are measured."""

from __future__ import annotations

from tutelage.stores.gaps import newest


def test_a_version_that_a_cut_off_cycle_left_in_training_hides_no_gap() -> None:
    def version(domain: str, number: int, status: str, tenant: str = "a") -> dict[str, object]:
        return {"tenant_id": tenant, "domain": domain, "version": number, "status": status}

    known = newest(
        [
            version("sums", 1, "training"),
            version("gold", 1, "refused"),
            version("gold", 2, "training"),
            version("oil", 1, "student"),
            version("oil", 2, "ta"),
            version("tin", 1, "ta", tenant="b"),
        ],
        "a",
    )
    assert {domain: v["version"] for domain, v in known.items()} == {"gold": 1, "oil": 2}
