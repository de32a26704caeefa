"""What of the encoder needs no model; `tests/integration/test_encoder_export.py` has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.routing.encoder import Encoder, EncoderMissing
from tutelage.settings import CHECKOUT


def test_a_folder_without_the_export_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EncoderMissing, match=r"lacks manifest\.json, model\.onnx; run `python -m inference\.encoder_export --out"):
        Encoder(tmp_path)


def test_importing_the_router_loads_no_heavy_library() -> None:
    program = (
        "import sys, tutelage.scoring, tutelage.routing.encoder, tutelage.routing.domains, tutelage.routing.policy;"
        "import tutelage.routing.estimates, tutelage.routing.promises, tutelage.routing.recognition, tutelage.routing.revision;"
        "print(sorted({'torch', 'numpy', 'faiss', 'sklearn', 'scipy', 'onnxruntime'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert found.stdout.strip() == "[]"
