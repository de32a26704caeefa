"""An adapter folder is believed only as far as it can be checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import build_tiny_adapter, build_tiny_base
from safetensors.torch import load_file, save_file

from inference import adapters, base
from tutelage.errors import AdapterRejected


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def original(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    build_tiny_adapter(base_dir, folder, seed=1)
    return folder


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / adapters.WEIGHTS)


def refusal(folder: Path, base_dir: Path, *, digest: str | None = None, fingerprint: str | None = None) -> str:
    with pytest.raises(AdapterRejected) as refused:
        adapters.verify(
            folder,
            digest=digest or adapters.digest(folder),
            base_fingerprint=fingerprint or base.fingerprint(base_dir),
        )
    return refused.value.message


def test_a_good_adapter_is_described(adapter: Path, base_dir: Path) -> None:
    info = adapters.verify(adapter, digest=adapters.digest(adapter), base_fingerprint=base.fingerprint(base_dir))
    assert info.rank == 4
    assert info.path == adapter.resolve()
    assert info.parameters == sum(t.numel() for t in load_file(adapter / adapters.WEIGHTS).values())


def test_the_digest_ignores_order_and_training_settings(adapter: Path) -> None:
    before = adapters.digest(adapter)
    config = json.loads((adapter / adapters.CONFIG).read_text())
    edit_json(adapter / adapters.CONFIG, target_modules=sorted(config["target_modules"], reverse=True), lora_dropout=0.3)
    edit_weights(adapter, lambda tensors: tensors.update(dict(reversed(list(tensors.items())))))
    assert adapters.digest(adapter) == before


@pytest.mark.parametrize("change", [{"lora_alpha": 99}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_the_digest_changes_with_every_setting_that_changes_the_function(adapter: Path, change: dict[str, Any]) -> None:
    before = adapters.digest(adapter)
    edit_json(adapter / adapters.CONFIG, **change)
    assert adapters.digest(adapter) != before


def test_one_changed_weight_is_refused(adapter: Path, base_dir: Path) -> None:
    digest = adapters.digest(adapter)
    edit_weights(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1e-3))
    assert "expected" in refusal(adapter, base_dir, digest=digest)


def test_an_adapter_of_another_base_is_refused(adapter: Path, base_dir: Path) -> None:
    assert "trained on base" in refusal(adapter, base_dir, fingerprint="0" * 64)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "state.pkl", "modeling.py"])
def test_files_that_could_carry_code_are_refused(adapter: Path, base_dir: Path, name: str) -> None:
    (adapter / name).write_bytes(b"x")
    assert name in refusal(adapter, base_dir)


@pytest.mark.parametrize("name", [adapters.WEIGHTS, adapters.CONFIG, adapters.MANIFEST])
def test_a_missing_file_is_named(adapter: Path, base_dir: Path, name: str) -> None:
    digest = adapters.digest(adapter)
    (adapter / name).unlink()
    assert name in refusal(adapter, base_dir, digest=digest)


@pytest.mark.parametrize("name", [adapters.WEIGHTS, adapters.CONFIG, adapters.MANIFEST])
def test_a_truncated_file_is_refused(adapter: Path, base_dir: Path, name: str) -> None:
    digest = adapters.digest(adapter)
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    assert adapter.name in refusal(adapter, base_dir, digest=digest)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"use_dora": True},
        {"r": 0},
    ],
)
def test_anything_but_plain_lora_is_refused(adapter: Path, base_dir: Path, change: dict[str, Any]) -> None:
    edit_json(adapter / adapters.CONFIG, **change)
    assert next(iter(change)) in refusal(adapter, base_dir)


def test_weights_that_are_not_lora_are_refused(adapter: Path, base_dir: Path) -> None:
    edit_weights(adapter, lambda tensors: tensors.update({"lm_head.weight": next(iter(tensors.values())).clone()}))
    assert "lm_head.weight" in refusal(adapter, base_dir)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(adapter: Path, base_dir: Path, dtype: str, value: float) -> None:
    import torch

    def damage(tensors: dict[str, Any]) -> None:
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].to(getattr(torch, dtype))
        tensors[name].view(-1)[3] = value

    edit_weights(adapter, damage)
    assert "NaN or infinite" in refusal(adapter, base_dir)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="not a folder"):
        adapters.verify(tmp_path / "nowhere", digest="0" * 64, base_fingerprint="0" * 64)
