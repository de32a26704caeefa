"""Finetuning a tiny random base: it learns, the same way twice, and refuses what would train silently wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import build_tiny_base

from inference import adapters, base, prompts
from training import attention, losses, memory, objective, packing, recipe, students, targets
from training.checkpoints import Checkpoint, Progress
from training.encoding import check_masks, encode
from training.examples import Example
from training.finetune import finetune
from training.measure import measure
from training.merge import merge
from training.packing import Sample
from training.prune import prune
from training.recipe import FinetuneSettings, TrainingFailed
from training.schedule import plan, rate_at
from training.students import Student
from tutelage.errors import AdapterRejected
from tutelage.settings import CHECKOUT
from tutelage.stores.datasets import read_curve

FLOAT32 = base.Precision("float32", "tests")
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
        curve=out / "curve.csv",
        say=lambda line: None,
    )
    return manifest, read_curve(out / "curve.csv")


@pytest.fixture(scope="module")
def trained(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("trained")
    return out, *run(tiny, data, out)


def blank(tiny: Path, precision: base.Precision = FLOAT32) -> Student:
    """A base in real 4 bits, as a GPU trains on, with an adapter that is still zero."""
    model, tokenizer = base.load(tiny, quantization="nf4", precision=precision)
    model.set_attn_implementation(attention.register())
    return students.adapted(Student(model, tokenizer, precision), QUICK)


def student(tiny: Path, precision: base.Precision = FLOAT32) -> Student:
    """A quantised base with an adapter that is no longer zero, ready to train."""
    torch.manual_seed(0)
    adapted = blank(tiny, precision)
    adapted.model.train()
    for name, weight in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted


def samples_of(tiny: Path, data: Path, count: int) -> list[Sample]:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:count]]
    examples = [Example(({"role": "user", "content": row["prompt"]},), row["label"], row["label"]) for row in rows]
    return encode(examples, base.load_tokenizer(tiny), QUICK)


def gradients(student: Student, groups: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
    student.model.zero_grad()
    for group in groups:
        pack = packing.pack(group, student.model.device)
        torch.nn.functional.cross_entropy(student.logits(pack), pack.targets, reduction="sum").backward()
    return {name: weight.grad.clone() for name, weight in student.model.named_parameters() if weight.requires_grad}


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
    model = student(tiny)
    packed, separate = gradients(model, [samples]), gradients(model, [[sample] for sample in samples])
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_before_and_after_an_evaluation(tiny: Path, data: Path, dtype: str) -> None:
    """In bfloat16 bitsandbytes repacks weights at the first evaluation on some CPUs, and gradients are lost from then on."""
    samples = samples_of(tiny, data, 6)
    model = student(tiny, base.Precision(dtype, "tests"))
    before = gradients(model, [samples])
    measure(model, samples, pass_tokens=QUICK.pass_tokens)
    after = gradients(model, [samples])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.abs().sum() > 0 for gradient in after.values())


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to half precision hides what these tests compare."""
    monkeypatch.setattr(base, "detect_precision", lambda: FLOAT32)


@pytest.mark.usefixtures("float32")
def test_small_passes_train_like_large_ones(tiny: Path, data: Path, tmp_path: Path) -> None:
    short = QUICK.model_copy(update={"budget_tokens": 1500, "probe_tokens": 0})
    _, large = run(tiny, data, tmp_path / "large", short)
    _, small = run(tiny, data, tmp_path / "small", short.model_copy(update={"pass_tokens": 64}))
    assert [row["loss"] for row in large] == pytest.approx([row["loss"] for row in small], rel=1e-3)


def test_an_adapter_that_did_not_move_is_refused(tiny: Path) -> None:
    untrained = blank(tiny)
    with pytest.raises(TrainingFailed, match="did not train"):
        students.check_moved(untrained, students.norms(untrained))


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


def test_training_ends_when_validation_stops_improving_and_keeps_the_best(tiny: Path, data: Path, tmp_path: Path) -> None:
    lasting = {"budget_tokens": None, "max_epochs": 40, "validations": 40, "patience": 2, "mastered_loss": 0.0, "probe_tokens": 0}
    manifest, curve = run(tiny, data, tmp_path, QUICK.model_copy(update=lasting))
    measured = [(row["val_accuracy"], -row["val_loss"]) for row in curve if "val_loss" in row]
    assert manifest["metrics"]["steps"] < manifest["metrics"]["planned_steps"]
    assert measured.index(max(measured)) == len(measured) - 3
    assert manifest["metrics"]["final_val_loss"] == -max(measured)[1]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_adapter(tiny: Path, data: Path, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"checkpoint_steps": 5, "probe_tokens": 0, "threads": 1})
    whole, curve = run(tiny, data, tmp_path / "whole", config)
    out = tmp_path / "killed"
    file = tmp_path / "recipe.yaml"
    file.write_text(config.model_dump_json())
    command = [*(sys.executable, "-m", "training.finetune", "--base", tiny, "--config", file, "--out", out / "adapter")]
    command += [*("--data", data / "train.jsonl", "--validation", data / "validation.jsonl", "--curve", out / "curve.csv")]
    killed = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    while not (out / "adapter.checkpoint" / "state.safetensors").exists() or steps_of(out) < 8:
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    reached = steps_of(out)
    said: list[str] = []
    again = finetune(
        data / "train.jsonl",
        out / "adapter",
        validation=data / "validation.jsonl",
        base_dir=tiny,
        config=config,
        curve=out / "curve.csv",
        say=said.append,
    )
    resumed = next(int(line.split("step ")[1]) for line in said if "going on" in line)
    assert reached - 5 <= resumed <= reached < len(curve)
    assert again["adapter_digest"] == whole["adapter_digest"]
    rows = read_curve(out / "curve.csv")
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in curve]
    assert not (out / "adapter.checkpoint").exists()


def steps_of(out: Path) -> int:
    return len((out / "curve.csv").read_text().splitlines()) if (out / "curve.csv").exists() else 0


def test_a_checkpoint_of_other_data_is_not_continued(tiny: Path, data: Path, tmp_path: Path) -> None:
    student = blank(tiny)
    optimizer = torch.optim.AdamW(student.weights)
    rate = torch.optim.lr_scheduler.ConstantLR(optimizer)
    Checkpoint(tmp_path, "one").write(Progress(step=7), student.weights, None, optimizer, rate)
    assert Checkpoint(tmp_path, "one").restore(student.weights, optimizer, rate)[0].step == 7
    assert Checkpoint(tmp_path, "other").restore(student.weights, optimizer, rate)[0].step == 0


@pytest.mark.slow
def test_two_processes_train_what_one_does(tiny: Path, data: Path, tmp_path: Path) -> None:
    """`accelerate launch` with the shipped CPU configuration, each process taking its share of every step's passes."""
    config = QUICK.model_copy(update={"budget_tokens": 1500, "probe_tokens": 0, "pass_tokens": 64, "threads": 1})
    _, curve = run(tiny, data, tmp_path / "one", config)
    file = tmp_path / "recipe.yaml"
    file.write_text(config.model_dump_json())
    launch = Path(sys.executable).parent / "accelerate"
    command = [*(launch, "launch", "--config_file", CHECKOUT / "configs/accelerate/cpu.yaml", "--num_processes", "2")]
    command += [*("--main_process_port", "0", "-m", "training.finetune", "--base", tiny, "--config", file)]
    command += [*("--data", data / "train.jsonl", "--out", tmp_path / "two", "--curve", tmp_path / "two.csv")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = read_curve(tmp_path / "two.csv")
    assert len(rows) == len(curve)
    assert [row["loss"] for row in rows[:3]] == pytest.approx([row["loss"] for row in curve[:3]], rel=0.03)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_low_rank_weights_on_the_plain_base_and_all_weights_learn_too(tiny: Path, data: Path, tmp_path: Path, method: str) -> None:
    rate = 1e-2 if method == "lora" else 2e-3
    manifest, curve = run(tiny, data, tmp_path, QUICK.model_copy(update={"method": method, "learning_rate": rate}))
    assert curve[-1]["loss"] < curve[0]["loss"] / 5
    if method == "full":
        assert manifest["student_fingerprint"] == base.fingerprint(tmp_path / "adapter") != base.fingerprint(tiny)
        assert base.serving(tmp_path / "adapter") == "none", "weights that nobody rounded in training are not rounded to serve"
        assert base.serving(tiny) == base.SERVING


@pytest.mark.usefixtures("float32")
def test_recomputed_activations_change_nothing(tiny: Path, data: Path, tmp_path: Path) -> None:
    short = QUICK.model_copy(update={"budget_tokens": 1500, "probe_tokens": 0})
    _, kept = run(tiny, data, tmp_path / "kept", short)
    _, again = run(tiny, data, tmp_path / "again", short.model_copy(update={"recompute": "on"}))
    assert [row["loss"] for row in kept] == pytest.approx([row["loss"] for row in again], rel=1e-4)


def test_a_training_that_cannot_fit_is_refused_before_it_starts(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1e6)
    with pytest.raises(TrainingFailed, match="does not fit"):
        run(tiny, data, tmp_path)


def test_soft_targets_of_a_local_teacher_are_its_probabilities(tiny: Path, data: Path) -> None:
    teacher, samples = student(tiny), samples_of(tiny, data, 5)
    taught = targets.of_teacher(teacher, samples, top=3, pass_tokens=64)
    alone = packing.pack([samples[2]], teacher.model.device)
    logprobs = torch.log_softmax(teacher.logits(alone), -1).detach().cpu()
    soft = taught[2].soft
    assert soft is not None
    assert soft.ids.tolist() == logprobs.topk(3).indices.tolist()
    assert soft.logprobs == pytest.approx(logprobs.topk(3).values.numpy(), abs=1e-4)
    assert np.exp(soft.logprobs).sum(-1) + np.exp(soft.tail) == pytest.approx(np.ones(len(soft.tail)), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_local_teacher_is_no_distance_from_itself_at_the_temperature_of_the_loss(tiny: Path, data: Path, temperature: float) -> None:
    teacher, samples = student(tiny), samples_of(tiny, data, 3)
    pack = packing.pack(targets.of_teacher(teacher, samples, top=3, pass_tokens=512, temperature=temperature), teacher.model.device)
    logits = teacher.logits(pack)[pack.soft_at]
    apart = losses.divergence(logits, pack.soft_ids, pack.soft_logprobs, pack.soft_tail, temperature=temperature)
    assert apart.abs().max() < 1e-5


@pytest.mark.parametrize("split", [512, 40])
def test_a_step_with_everything_in_it_has_one_gradient_however_it_is_divided(tiny: Path, data: Path, split: int) -> None:
    mixed = QUICK.model_copy(update={"strategy": "multi-aspect", "pass_tokens": split})
    made = student(tiny)
    soft = targets.of_teacher(blank(tiny), samples_of(tiny, data, 6), top=8, pass_tokens=512)
    batch = [replace(s, weight=1 + i / 4, rejected=(5, s.completion[-1]) if i % 3 == 0 else None) for i, s in enumerate(soft)]
    batch = objective.with_reference(blank(tiny), batch, pass_tokens=512)
    gradients = []
    for passes in (packing.split(batch, split), [[sample] for sample in batch]):
        made.model.zero_grad()
        for part in passes:
            pack = packing.pack(part, made.model.device)
            tokens = sum(sample.tokens for sample in batch)
            objective.loss(made.logits(pack), pack, mixed, tokens=tokens, pairs=2).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in made.weights]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_soft_targets_made_with_another_tokenizer_are_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = base.load_tokenizer(tiny)
    row = {"prompt": "Which?", "label": "yes", "targets": {"top_ids": [[1]], "top_logprobs": [[-0.1]], "tail_logprob": [-3.0]}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TrainingFailed, match="cannot be read"):
        targets.check_origin(tmp_path / "train.jsonl", tokenizer)
    hashes = {"tokenizer_hash": "0" * 64, "template_hash": prompts.template_hash(tokenizer)}
    targets.manifest_of(tmp_path / "train.jsonl").write_text(json.dumps(hashes))
    with pytest.raises(TrainingFailed, match="tokenizer_hash"):
        finetune(
            tmp_path / "train.jsonl",
            tmp_path / "out",
            validation=None,
            base_dir=tiny,
            config=QUICK.model_copy(update={"strategy": "soft-targets"}),
            curve=tmp_path / "curve.csv",
        )


def test_rationales_preferences_and_weights_are_learnt_together(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"Which category is {colour} number {i}?"}],
            "label": answer,
            "rationale": f"The color {colour} is {answer}.",
            "chosen": answer,
            "rejected": "world",
            "weight": 1.5,
        }
        for i in range(20)
        for colour, answer in ANSWER_OF.items()
    ]
    for name, part in (("train", rows[:48]), ("validation", rows[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    manifest, _ = run(tiny, tmp_path, tmp_path / "out", QUICK.model_copy(update={"strategy": "multi-aspect", "budget_tokens": 9000}))
    assert manifest["metrics"]["examples"] == 2 * 48
    assert manifest["metrics"]["final_val_accuracy"] >= 0.9


def test_a_student_cut_from_its_parent_answers_with_fewer_layers(tiny: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    model, tokenizer = base.load(tiny, precision=FLOAT32)
    model.config.num_hidden_layers = 6
    type(model)(model.config).save_pretrained(str(deep))
    tokenizer.save_pretrained(str(deep))
    assert prune(deep, tmp_path / "shallow", keep=4) == [0, 2, 3, 5]
    cut, _ = base.load(tmp_path / "shallow", precision=FLOAT32)
    whole, _ = base.load(deep, precision=FLOAT32)
    assert len(cut.model.layers) == cut.config.num_hidden_layers == 4
    torch.testing.assert_close(cut.model.layers[1].mlp.up_proj.weight, whole.model.layers[2].mlp.up_proj.weight, rtol=0.01, atol=0.01)
    assert cut.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_merged_weights_are_judged_as_they_would_be_served(tiny: Path, data: Path, tmp_path: Path, trained: tuple[Path, Any, Any]) -> None:
    report = merge(trained[0] / "adapter", tmp_path / "merged", data=data / "validation.jsonl", base_dir=tiny, most_lost=1.0)
    assert report["merged_fingerprint"] == base.fingerprint(tmp_path / "merged")
    assert base.serving(tmp_path / "merged") == "none"
    assert min(report["adapter"]["correct"], report["merged"]["correct"]) >= 38
    with pytest.raises(AdapterRejected, match="Serve it unmerged"):
        merge(trained[0] / "adapter", tmp_path / "worse", data=data / "validation.jsonl", base_dir=tiny, most_lost=-1.0)
    assert not (tmp_path / "worse").exists()


@pytest.mark.parametrize("name", recipe.PRESETS)
def test_the_shipped_recipes_are_what_they_say(name: recipe.Preset) -> None:
    said = {"fast": ("response", 16, 1, 0), "balanced": ("response", 16, 3, 4), "quality": ("multi-aspect", 128, 5, 3)}
    found = recipe.preset(name)
    assert (found.strategy, found.step_examples, found.max_epochs, found.patience) == said[name]
    assert recipe.chosen(None, None) == recipe.preset("balanced")
