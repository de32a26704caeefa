"""Products of 8 bits: close to the floats, whatever they are computed with, and fewer nodes than were asked for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from inference import rounding

WIDTH = 16


def graph(random: np.random.Generator, *, uneven: float) -> onnx.ModelProto:
    """Two products of one input, the first with a bias; the input's channels differ by a factor of up to `uneven`."""
    first, second = (random.normal(size=(WIDTH, 8)).astype(np.float32) / uneven_by(uneven)[:, None] for _ in range(2))
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["product"]),
        helper.make_node("Add", ["bias", "product"], ["with_bias"]),
        helper.make_node("MatMul", ["x", "second"], ["other"]),
        helper.make_node("Add", ["with_bias", "other"], ["y"]),
    ]
    constants = {"first": first, "second": second, "bias": random.normal(size=8).astype(np.float32)}
    inner = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def uneven_by(most: float) -> np.ndarray:
    return np.geomspace(1.0, most, WIDTH).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    from onnxruntime import InferenceSession

    return np.asarray(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), uneven=st.sampled_from([1.0, 10.0, 1000.0]))
def test_the_rounded_products_are_close_however_uneven_the_channels_and_whatever_the_batch(seed: int, uneven: float) -> None:
    random = np.random.default_rng(seed)
    model = graph(random, uneven=uneven)
    seen = [{"x": (random.normal(size=(20, WIDTH)) * uneven_by(uneven)).astype(np.float32)} for _ in range(20)]
    small = rounding.rounded(model, seen)
    x = seen[0]["x"]
    exact, found = run(model, x), run(small, x)

    assert np.square(found - exact).sum() / np.square(exact).sum() < 1e-3
    assert np.array_equal(run(small, x[3:4])[0], found[3])  # alone as among others
    made = [node.op_type for node in small.graph.node if node.op_type not in ("Gather", "MatMul", "Add")]
    assert made == ["Mul", "QuantizeLinear", "MatMulIntegerToFloat", "Split"]  # both products at once
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add", "MatMul", "Add"]  # the float model is left as it was


def test_a_channel_that_would_spoil_the_others_stays_a_float() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(200, WIDTH)).astype(np.float32)
    rows[:, 3] *= 1000.0
    weight = random.normal(size=(WIDTH, 8)).astype(np.float32)
    chosen = rounding.choose(rounding.Seen(rows.max(0), rows.min(0), rows), weight)

    assert 3 in chosen.floats
    assert chosen.evened[3] == 0.0
    assert chosen.error < 1e-6


def test_an_input_that_is_never_anything_but_nought_can_be_rounded() -> None:
    nothing = rounding.Seen(np.zeros(3, np.float32), np.zeros(3, np.float32), np.zeros((5, 3), np.float32))
    chosen = rounding.choose(nothing, np.zeros((3, 2), np.float32))
    assert np.isfinite([chosen.scale, *chosen.evened]).all()


def test_samples_have_every_shape_and_are_the_same_for_the_same_seed() -> None:
    sentences = [f"This is paragraph number {i} of many, and it says so." for i in range(900)]
    texts = rounding.samples(["one", "two"], sentences, seed=3)

    assert texts == rounding.samples(["two", "one"], sentences, seed=3)
    assert texts != rounding.samples(["one", "two"], sentences, seed=4)
    assert any(text.replace(" ", "").replace("-", "").isdigit() for text in texts)
    assert any(set(text.split()) <= {"one", "two"} for text in texts)


@pytest.mark.parametrize("sentences", [[], ["Only one paragraph, which is short."]])
def test_few_sentences_are_enough(sentences: list[str]) -> None:
    assert rounding.samples(["word"], sentences)
