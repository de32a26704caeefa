"""What may and may not be imported, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tutelage.settings import CHECKOUT

HEAVY = ("torch", "transformers", "peft", "prefect", "mlflow", "bentoml", "dvc", "sklearn", "scipy", "pandas")


def modules_after(statement: str) -> set[str]:
    script = f"{statement}; import sys; print(' '.join(sys.modules))"
    told = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return set(told.stdout.split())


@pytest.mark.parametrize("statement", ["import tutelage.gateway.app", "import tutelage.cli", "import tutelage.operations"])
def test_the_gateway_and_the_command_line_import_nothing_heavy(statement: str) -> None:
    assert modules_after(statement) & set(HEAVY) == set()


def test_flows_import_no_torch_and_start_trainings_as_processes() -> None:
    assert modules_after("import flows.evolve") & {"torch", "transformers", "peft", "mlflow", "training", "bentos"} == set()


def test_the_locked_fastapi_is_one_that_prefects_server_starts_with() -> None:
    """Newer ones break it, and it only says so after its whole start timeout."""
    assert "prefect.server.api.server" in modules_after("import prefect.server.api.server")
