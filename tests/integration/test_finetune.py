"""Finetuning a tiny random base: it learns, the same way twice, and refuses what would train silently wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import build_tiny_base

from inference import adapters, base
from training.examples import Example
from training.finetune import (
    FinetuneSettings,
    TrainingFailed,
    check_masks,
    check_moved,
    encode,
    finetune,
    forward,
    measure,
    plan,
    rate_at,
    with_adapter,
)
from training.packing import Sample

QUICK = FinetuneSettings(learning_rate=1e-2, budget_tokens=5000, probe_tokens=1500, max_epochs=10)
ANSWER_OF = {"red": "yes", "green": "sports", "blue": "no"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and validation.jsonl: the answer depends on a colour in the prompt."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Which category is {colour} number {i}?", "label": ANSWER_OF[colour]} for i in range(40) for colour in ANSWER_OF]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:80]), ("validation", rows[80:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def run(tiny: Path, data: Path, out: Path, config: FinetuneSettings = QUICK) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manifest = finetune(
        data / "train.jsonl",
        out / "adapter",
        validation=data / "validation.jsonl",
        base_dir=tiny,
        config=config,
        curve=out / "curve.jsonl",
        say=lambda line: None,
    )
    return manifest, [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("trained")
    return out, *run(tiny, data, out)


def student(tiny: Path, samples: Sequence[Sample]) -> Any:
    """A quantised base with an adapter that is no longer zero, ready to train."""
    torch.manual_seed(0)
    model, _ = base.load(tiny, quantization="nf4", precision=base.Precision("float32", "tests"))
    adapted = with_adapter(model, QUICK).train()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted


def samples_of(tiny: Path, data: Path, count: int) -> list[Sample]:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:count]]
    examples = [Example(({"role": "user", "content": row["prompt"]},), row["label"], row["label"]) for row in rows]
    return encode(examples, base.load_tokenizer(tiny), QUICK)


def gradients(model: Any, groups: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for group in groups:
        logits, packed = forward(model, group)
        torch.nn.functional.cross_entropy(logits, packed.targets, reduction="sum").backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def test_loss_falls_and_unseen_items_are_answered(trained: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> None:
    _, manifest, curve = trained
    assert curve[-1]["loss"] < curve[0]["loss"] / 10
    assert curve[-1]["val_accuracy"] >= 0.95 > 0.1 > manifest["metrics"]["untrained_val_accuracy"]
    assert curve[-1]["step"] == manifest["metrics"]["steps"] == manifest["metrics"]["planned_steps"]


def test_the_adapter_passes_the_checks_of_serving(tiny: Path, trained: tuple[Path, dict[str, Any], Any]) -> None:
    out, manifest, _ = trained
    info = adapters.verify(out / "adapter", digest=manifest["adapter_digest"], base_fingerprint=base.fingerprint(tiny))
    assert info.rank == QUICK.rank


def test_the_manifest_says_what_was_trained_on_what(tiny: Path, trained: tuple[Path, dict[str, Any], Any]) -> None:
    out, manifest, _ = trained
    assert manifest == json.loads((out / "adapter" / "manifest.json").read_text())
    assert manifest["base_fingerprint"] == base.fingerprint(tiny)
    assert {"data_digest", "template_hash", "seed", "settings", "metrics", "versions", "precision", "threads"} <= manifest.keys()
    assert manifest["learnable"] is True


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    tiny: Path, data: Path, tmp_path: Path, trained: tuple[Path, dict[str, Any], Any]
) -> None:
    again, _ = run(tiny, data, tmp_path / "again")
    other, _ = run(tiny, data, tmp_path / "other", QUICK.model_copy(update={"seed": 1}))
    assert again["adapter_digest"] == trained[1]["adapter_digest"] != other["adapter_digest"]


def test_a_hopeless_training_stops_at_the_probe_and_says_so(tiny: Path, data: Path, tmp_path: Path) -> None:
    manifest, curve = run(tiny, data, tmp_path, QUICK.model_copy(update={"learning_rate": 1e-6}))
    assert manifest["learnable"] is False
    assert "not learnable by this base at this budget" in manifest["reason"]
    assert len(curve) == manifest["metrics"]["steps"] < manifest["metrics"]["planned_steps"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_packed_examples_give_the_gradients_of_separate_passes(tiny: Path, data: Path) -> None:
    samples = samples_of(tiny, data, 6)
    model = student(tiny, samples)
    packed, separate = gradients(model, [samples]), gradients(model, [[sample] for sample in samples])
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-3, atol=1e-5)


def test_gradients_are_the_same_before_and_after_an_evaluation(tiny: Path, data: Path) -> None:
    samples = samples_of(tiny, data, 6)
    model = student(tiny, samples)
    before = gradients(model, [samples])
    measure(model, samples, QUICK)
    after = gradients(model, [samples])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.abs().sum() > 0 for gradient in after.values())


def test_small_passes_train_like_large_ones(tiny: Path, data: Path, tmp_path: Path) -> None:
    short = QUICK.model_copy(update={"budget_tokens": 1500, "probe_tokens": 0})
    _, large = run(tiny, data, tmp_path / "large", short)
    _, small = run(tiny, data, tmp_path / "small", short.model_copy(update={"pass_tokens": 64}))
    assert [row["loss"] for row in large] == pytest.approx([row["loss"] for row in small], rel=0.02)


def test_an_adapter_that_did_not_move_is_refused(tiny: Path) -> None:
    model, _ = base.load(tiny, quantization="nf4", precision=base.Precision("float32", "tests"))
    with pytest.raises(TrainingFailed, match="did not train"):
        check_moved(with_adapter(model, QUICK))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample((1, 2), ()), "no supervised token"),
        (Sample((), (5, 9)), "only supervised tokens"),
        (Sample((1, 2), (5, 6)), "does not end with the one stop token"),
        (Sample((1, 2), (9, 9)), "does not end with the one stop token"),
    ],
)
def test_masks_that_would_train_wrong_are_refused(sample: Sample, message: str) -> None:
    with pytest.raises(TrainingFailed, match=message):
        check_masks([Sample((1,), (2, 9)), sample], stop_id=9)


def test_data_that_fits_nowhere_is_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="max_example_tokens=5"):
        run(tiny, data, tmp_path, QUICK.model_copy(update={"max_example_tokens": 5}))


def test_the_budget_is_in_tokens_and_gives_short_examples_more_company() -> None:
    config = FinetuneSettings(budget_tokens=4000, step_tokens=200, step_examples=4, max_epochs=100)
    short = plan([Sample(tuple(range(i, i + 10)), (1, 2)) for i in range(50)], config)
    long = plan([Sample(tuple(range(i, i + 100)), (1, 2)) for i in range(50)], config)
    assert len(short) > len(long)
    assert len(short[0]) > len(long[0]) == 4


def test_the_learning_rate_rises_then_falls_to_nearly_nothing() -> None:
    rates = [rate_at(step, 100, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
