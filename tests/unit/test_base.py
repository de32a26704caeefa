"""The base is identified by what it computes, and loaded in a precision that suits the machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fakes import build_tiny_base

from inference import base
from inference.base import BaseUnavailable, choose_precision


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base_dir(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "base"))


def test_a_copy_has_the_same_fingerprint(original: Path, base_dir: Path) -> None:
    assert base.fingerprint(base_dir) == base.fingerprint(original)


def test_another_seed_has_another_fingerprint(original: Path, tmp_path: Path) -> None:
    assert base.fingerprint(build_tiny_base(tmp_path, seed=1)) != base.fingerprint(original)


def test_the_library_version_that_saved_the_files_does_not_matter(base_dir: Path) -> None:
    before = base.fingerprint(base_dir)
    config = json.loads((base_dir / "config.json").read_text())
    (base_dir / "config.json").write_text(json.dumps({**config, "transformers_version": "99.0"}))
    assert base.fingerprint(base_dir) == before


def test_another_chat_template_is_another_base(base_dir: Path) -> None:
    before = base.fingerprint(base_dir)
    template = base_dir / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert base.fingerprint(base_dir) != before


def test_a_changed_weight_of_the_same_size_is_noticed_in_spite_of_the_cache(base_dir: Path) -> None:
    before = base.fingerprint(base_dir)
    weights = base_dir / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert base.fingerprint(base_dir) != before


def test_a_read_only_base_still_has_a_fingerprint(base_dir: Path) -> None:
    base_dir.chmod(0o500)
    try:
        assert len(base.fingerprint(base_dir)) == 64
    finally:
        base_dir.chmod(0o700)


def test_an_incomplete_base_is_refused_with_what_is_missing(base_dir: Path) -> None:
    (base_dir / "tokenizer.json").unlink()
    with pytest.raises(BaseUnavailable, match=r"tokenizer\.json"):
        base.load(base_dir)


def test_a_base_that_is_there_already_is_not_made_again(tmp_path: Path) -> None:
    made = tmp_path / base.NAME
    made.mkdir()
    (made / "config.json").write_text("{}")
    assert base.materialise(tmp_path) == made


@pytest.mark.parametrize(
    ("flags", "cuda", "dtype"),
    [
        ({"avx2"}, None, "float32"),
        ({"avx2", "avx512_bf16"}, None, "bfloat16"),
        ({"amx_bf16"}, None, "bfloat16"),
        (set(), (9, 0), "bfloat16"),
        ({"avx512_bf16"}, (7, 5), "float32"),
    ],
)
def test_bfloat16_is_chosen_only_where_it_is_fast(flags: set[str], cuda: tuple[int, int] | None, dtype: str) -> None:
    chosen = choose_precision(cpu_flags=flags, cuda=cuda)
    assert chosen.dtype == dtype
    assert chosen.reason


def test_nf4_layers_keep_their_gradients_after_an_eval_pass(base_dir: Path) -> None:
    """bitsandbytes 0.50.2 loses LoRA gradients after the first eval forward where it repacks weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, _ = base.load(base_dir, quantization="nf4", precision=base.Precision("float32", "tests"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    ids = torch.arange(20)[None]

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(float(g.abs().sum()) > 0 for g in after)


def test_serving_computes_exactly_what_training_computed(base_dir: Path) -> None:
    """An adapter is trained on 4-bit weights; served on the unrounded ones it would answer otherwise."""
    import torch

    exact = base.Precision("float32", "tests")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained, served, unrounded = (
            base.load(base_dir, quantization=kind, precision=exact)[0](input_ids=ids).logits for kind in ("nf4", base.SERVING, "none")
        )
    assert torch.equal(trained, served)
    assert not torch.allclose(served, unrounded)
