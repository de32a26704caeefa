"""A fresh adapter on a tiny base: the tier takes it, and it answers as the bare base does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import build_tiny_base

from inference import adapters, base, fresh
from inference.rack import AdapterRack
from tutelage.settings import CHECKOUT


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


def test_it_is_loadable_and_changes_no_answer(tiny: Path, tmp_path: Path) -> None:
    import torch

    digest = fresh.write(tiny, tmp_path / "fresh", name="acme-sums.v1")
    model, tokenizer = base.load(tiny, precision=base.Precision("float32", "a test"))
    ids = tokenizer("What is the answer?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = model(ids).logits
        rack = AdapterRack(model, base_fingerprint=base.fingerprint(tiny))
        info = rack.load("acme-sums.v1", tmp_path / "fresh", digest=digest)
        with rack.forward(rack.hold(["acme-sums.v1"])):
            adapted = model(ids).logits

    assert info.rank == fresh.RANK
    assert info.parameters > 0
    assert torch.equal(bare, adapted)


def test_each_version_begins_with_its_own_and_always_the_same(tiny: Path, tmp_path: Path) -> None:
    digests = [fresh.write(tiny, tmp_path / f"{n}", name=name) for n, name in enumerate(("a.v1", "a.v2", "a.v1"))]

    assert digests[0] == digests[2] != digests[1]
    adapters.verify(tmp_path / "0", digest=digests[0], base_fingerprint=base.fingerprint(tiny))


def test_it_needs_no_torch(tiny: Path, tmp_path: Path) -> None:
    base.fingerprint(tiny)  # known since the tier has loaded the base
    program = f"""
import sys
from pathlib import Path
from inference import fresh
fresh.write(Path({str(tiny)!r}), Path({str(tmp_path)!r}), name="a")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True)
