"""What an image of a Bento installs is what the lock pins."""

from __future__ import annotations

import re

import pytest
import yaml

from tutelage.settings import CHECKOUT


@pytest.mark.parametrize("bento", ["tier", "gateway"])
def test_the_bentos_pins_equal_the_lock(bento: str) -> None:
    config = yaml.safe_load((CHECKOUT / "bentos" / bento / "bentofile.yaml").read_text())
    locked = set((CHECKOUT / "requirements.lock").read_text().split())
    torch = re.search(r"torch==\S+", (CHECKOUT / "Makefile").read_text())
    assert torch is not None, "the Makefile installs torch by itself"
    for pin in config["python"]["packages"]:
        assert pin in locked | {torch.group()}, f"{pin} differs from requirements.lock"
    assert config["python"]["lock_packages"] is False
