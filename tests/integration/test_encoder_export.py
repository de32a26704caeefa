"""The exported encoder: the same numbers as torch without torch, and the domains it shows in real text."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from inference import encoder_export
from tutelage.routing.domains import DomainIndex, discover
from tutelage.routing.encoder import MAX_TOKENS, Encoder
from tutelage.settings import CHECKOUT

TASKS = {
    "aiw": {},
    "number_sequence": {"max_complexity": 1, "min_value": 1, "max_value": 20},
    "family_relationships": {"min_family_size": 3, "max_family_size": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {},
}
TEXTS = ["", "hi", "8, 5, 2, -1, ?", "Ünïcödé, 漢字 🎉", "a lone surrogate \ud800 from JSON", "one two three " * 200]


def questions(task: str, count: int) -> list[str]:
    sys.modules.setdefault("pycosat", types.ModuleType("pycosat"))  # imported by a task that is not used here
    import reasoning_gym

    return [row["question"] for row in reasoning_gym.create_dataset(task, size=count, seed=7, **TASKS[task])]


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> Encoder:
    return Encoder(encoder)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(encoder_export.export(tmp_path_factory.mktemp("floats") / "encoder", weights="float32"))


def test_the_float_export_computes_what_transformers_computes(floats: Encoder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = encoder_export._packaged_weights()
    model = AutoModel.from_pretrained(str(source), local_files_only=True).eval()
    batch = AutoTokenizer.from_pretrained(str(source), local_files_only=True)(
        TEXTS[:4] + TEXTS[5:], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    assert np.abs(floats.encode(TEXTS[:4] + TEXTS[5:]) - expected).max() < 1e-5


def test_rounded_weights_turn_no_embedding_far_and_are_a_fraction_of_the_size(loaded: Encoder, floats: Encoder, encoder: Path) -> None:
    manifest = json.loads((encoder / "manifest.json").read_text())
    if manifest["weights"] != "int8":
        pytest.skip(f"this processor keeps float weights: {manifest['int8_refused']}")
    texts = [*TEXTS[1:], *(question for task in TASKS for question in questions(task, 20))]
    cosines = (loaded.encode(texts) * floats.encode(texts)).sum(axis=1)

    assert cosines.min() > 0.99
    assert cosines.mean() > 0.995
    assert (encoder / "model.onnx").stat().st_size < 65e6  # 91 MB as floats; the table of words stays as it is


def test_a_processor_that_rounds_wrongly_keeps_float_weights(tmp_path: Path, floats: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_export.rounding, "rounded", lambda model, inputs: _broken(model))
    folder = encoder_export.export(tmp_path / "encoder")
    manifest = json.loads((folder / "manifest.json").read_text())

    assert manifest["weights"] == "float32"
    assert "cosine" in manifest["int8_refused"]
    assert Encoder(folder).encode(["hi"]) == pytest.approx(floats.encode(["hi"]), abs=1e-5)
    assert [path.name for path in folder.iterdir() if path.suffix == ".onnx"] == ["model.onnx"]
    before = (folder / "model.onnx").stat().st_mtime_ns
    encoder_export.export(folder)  # is not tried again at every start
    assert (folder / "model.onnx").stat().st_mtime_ns == before


def _broken(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the first matrix of its products turned round."""
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    names = {node.input[1] for node in broken.graph.node if node.op_type == "MatMul"}
    first = next(one for one in broken.graph.initializer if one.name in names)
    first.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(first), first.name))
    return broken


def test_rows_come_back_in_order_with_length_1_whatever_they_are_batched_with(encoder: Path) -> None:
    texts = TEXTS + [f"question {i} " * (i % 40 + 1) for i in range(120)]
    together = Encoder(encoder).encode(texts)
    alone = Encoder(encoder, cache_size=0)

    assert together.shape == (len(texts), 384)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-5)
    for i in (0, 4, 5, 6, 45, 125):
        assert alone.encode([texts[i]])[0] == pytest.approx(together[i], abs=1e-5)


def test_no_text_gives_no_rows(loaded: Encoder) -> None:
    assert loaded.encode([]).shape == (0, 384)


def test_a_repeated_text_is_answered_from_the_cache_and_old_ones_leave_it(encoder: Path) -> None:
    small = Encoder(encoder, cache_size=2)
    first = small.encode(["a", "b", "a"])
    assert (first[0] == first[2]).all()
    small.encode(["c", "d", "e"])
    assert len(small._cache) == 2
    assert small.encode(["a"])[0] == pytest.approx(first[0], abs=1e-5)


def test_tokens_are_counted_in_the_whole_text(loaded: Encoder) -> None:
    assert loaded.count_tokens("") == 0
    assert loaded.count_tokens("hello world") == 2
    assert loaded.count_tokens("word " * 1000) == 1000


def test_encoding_loads_no_torch(encoder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tutelage.routing.encoder import Encoder;"
        f"Encoder(Path({str(encoder)!r})).encode(['hello']); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert found.stdout.strip() == "set()"


def test_a_second_export_changes_nothing(encoder: Path) -> None:
    before = (encoder / "model.onnx").stat().st_mtime_ns
    assert encoder_export.export(encoder) == encoder
    assert (encoder / "model.onnx").stat().st_mtime_ns == before
    assert json.loads((encoder / "manifest.json").read_text())["parity_max_abs_difference"] < 1e-4
    assert [path.name for path in encoder.parent.iterdir()] == [encoder.name]  # nothing half written stays


def test_interleaved_traffic_without_labels_falls_into_one_domain_for_each_task(loaded: Encoder) -> None:
    traffic = [(task, question) for task in TASKS for question in questions(task, 50)]
    order = np.random.default_rng(0).permutation(len(traffic))
    tasks, texts = zip(*(traffic[i] for i in order), strict=True)
    embeddings = loaded.encode(list(texts))

    found = discover(embeddings, texts, labels=[None] * len(texts), seed=0)
    index = DomainIndex(found)
    placed = Counter((task, index.assign(row).domain) for task, row in zip(tasks, embeddings, strict=True))
    pairs = {(task, domain) for task, domain in placed if domain is not None}

    assert len(found) == len(pairs) == len(TASKS)
    assert {task for task, _ in pairs} == set(TASKS)
    assert sum(count for (_, domain), count in placed.items() if domain is None) <= len(texts) // 50
    assert index.assign(loaded.encode(["Please write a haiku about autumn rain."])[0]).domain is None
