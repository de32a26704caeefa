"""Configuration: every shipped file loads, and every fault is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.errors import ConfigInvalid
from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.settings import CHECKOUT, GatewaySettings, Home, ModelsSettings, RoutingSettings, TierSettings, load

KINDS = (
    EvolveSettings, GatewaySettings, ModelsSettings, PromotionSettings, RolloutSettings, RoutingSettings, TierSettings, WatchSettings,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_file_loads_and_says_what_the_code_defaults_to(kind: type) -> None:
    loaded = load(kind, CHECKOUT / "configs")

    assert (CHECKOUT / "configs" / f"{kind.__name__.removesuffix('Settings').lower()}.yaml").exists()
    if kind is not ModelsSettings:
        assert loaded == kind()


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "routing.yaml").write_text("treshold: 0.9\nmax_student_tokens: many\n")
    with pytest.raises(ConfigInvalid) as told:
        load(RoutingSettings, tmp_path)

    assert "treshold" in told.value.message
    assert "max_student_tokens" in told.value.message
    assert "'many'" in told.value.message


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{name: a, kind: openai}", "base_url"),
        ("{name: a, kind: recorded}", "path"),
        ("{name: a, kind: openai, base_url: 'http://x', delay_seconds: 1}", "only `recorded` has delay_seconds"),
        ("{name: a, kind: magic, base_url: x}", "kind"),
        ("{name: a, kind: openai, base_url: x}, {name: a, kind: openai, base_url: y}", "unique"),
    ],
)
def test_a_model_that_cannot_work_is_refused_with_what_it_lacks(tmp_path: Path, model: str, expected: str) -> None:
    (tmp_path / "models.yaml").write_text(f"models: [{model}]")
    with pytest.raises(ConfigInvalid, match=expected):
        load(ModelsSettings, tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="nowhere"):
        Home(tmp_path).config_dir(str(tmp_path / "nowhere"))


def test_a_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first = home.secret("pepper")

    assert home.secret("pepper") == first
    assert len(first) == 64
    assert (tmp_path / "secrets" / "pepper").stat().st_mode & 0o077 == 0
