"""Round the matrix products of an exported encoder to 8 bits, by scales fixed beforehand.

Scales that a batch chose itself (dynamic quantisation) would make an embedding depend on what it is computed with; these come from sample
texts. Channels are made alike first (SmoothQuant, arXiv 2211.10438), each product by the smoothing that changes it least on the samples,
and where a few wide ones spoil it those stay floats (LLM.int8(), arXiv 2208.07339). Knows ONNX graphs and values; it refuses to know which
model this is and what its embeddings are for.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONTRIBUTED = "com.microsoft"  # where ONNX Runtime keeps the product of rounded matrices that gives floats
LEVELS = 255
WEIGHT_LEVELS = 127  # symmetric
SMOOTHINGS = (0.5, 0.65, 0.75, 0.85, 0.95)  # how much of the unevenness moves into the weights; 0.5 in the paper
FLOATS = 8  # channels of an input that stay floats
WORTH = 2.0  # ... where that makes its product so many times as exact
ROWS_A_SAMPLE = 3  # kept of each to try roundings on
LEAST = 1e-5  # a channel that is never used


@dataclass(frozen=True)
class Seen:
    """What went through one place of a graph: the highest and the lowest value of each channel, and some rows, [rows, channels]."""

    high: np.ndarray
    low: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Rounding:
    """How the input of a product is rounded: channels `floats` are not; `evened` [channels] multiplies it first, by 0 where they are;
    `scale` and `zero` are those of 8 bits without sign.

    `error`: by how much the products on the samples change, as a share of their own square.
    """

    floats: np.ndarray
    evened: np.ndarray
    scale: float
    zero: int
    error: float


def samples(vocabulary: Iterable[str], sentences: Sequence[str], *, seed: int = 0) -> list[str]:
    """Texts of every shape that an encoder meets: paragraphs, long ones, sentences full of numbers, lower-case scraps, one
    phrase over and over, words at random, numbers alone.

    What is missing here is cut off there: without long texts and numbers the worst of 150 questions of GSM8K had a cosine of 0.983.
    """
    draw = random.Random(seed)
    words, paragraphs = sorted(vocabulary), list(sentences)
    draw.shuffle(paragraphs)
    kinds = [paragraphs[at : at + 150] for at in range(0, 750, 150)]
    texts = kinds[0][:60]
    texts += [" ".join(kinds[1][at : at + 3]) for at in range(0, min(len(kinds[1]), 90), 3)]
    for split in (paragraph.split() for paragraph in kinds[2][:40]):
        texts.append(" ".join(draw.choice((word, word, word, str(draw.randint(0, 9999)), f"${draw.random() * 100:.2f}")) for word in split))
    for split in (paragraph.split() for paragraph in kinds[3]):
        start = draw.randint(0, max(0, len(split) - 2))
        texts.append(" ".join(split[start : start + draw.randint(2, 12)]).lower())
    texts += [" ".join(paragraph.split()[:6] * 40) for paragraph in kinds[4][:20]]
    texts += [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(100)]
    texts += draw.choices(words, k=50)
    texts += [" ".join(str(draw.randint(-999, 9999)) for _ in range(draw.randint(2, 20))) for _ in range(50)]
    return texts


def rounded(model: onnx.ModelProto, inputs: Sequence[Mapping[str, np.ndarray]]) -> onnx.ModelProto:
    """A copy of the model whose products with constant weights are of 8 bits; `inputs` are the samples, one feed each.

    Products of the same input become one, which is split again: there is less to start.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    constants = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
    products = {node.output[0]: node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in constants}
    of: dict[str, list[onnx.NodeProto]] = {}
    for node in products.values():
        of.setdefault(node.input[0], []).append(node)
    biases = _biases(graph.graph, products, constants)
    added = {add.output[0] for add, _ in biases.values()}
    seen = observe(graph, list(of), inputs)
    nodes: list[onnx.NodeProto] = []
    kept: list[onnx.TensorProto] = []
    for node in graph.graph.node:
        if node.output[0] in added:
            continue  # the product adds it
        if node.output[0] not in products:
            nodes.append(node)
            continue
        source = node.input[0]
        if source in of:
            together = [_Product(constants[one.input[1]], *_ending(one, biases, constants)) for one in of.pop(source)]
            nodes += _nodes(source, together, choose(seen[source], np.concatenate([one.weight for one in together], axis=1)), kept)
    _replace(graph, nodes, kept)
    return graph


def observe(model: onnx.ModelProto, names: Sequence[str], inputs: Sequence[Mapping[str, np.ndarray]], *, seed: int = 0) -> dict[str, Seen]:
    """What goes through the graph under each of these names."""
    from onnxruntime import InferenceSession, SessionOptions

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(seed)
    found: dict[str, list[Seen]] = {name: [] for name in names}
    for one in inputs:
        for name, value in zip(names, session.run(list(names), dict(one)), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            found[name].append(Seen(rows.max(0), rows.min(0), rows[draw.integers(0, len(rows), ROWS_A_SAMPLE)]))
    return {
        name: Seen(np.max([p.high for p in parts], axis=0), np.min([p.low for p in parts], axis=0), np.concatenate([p.rows for p in parts]))
        for name, parts in found.items()
    }


def choose(seen: Seen, weight: np.ndarray) -> Rounding:
    """The rounding of one input that changes its product least; channels stay floats where that is worth it. Shapes: weight
    [channels, outputs]."""
    all_rounded, few_floats = (_least_wrong(seen, weight, floats) for floats in (0, min(FLOATS, len(weight) // 2)))
    return few_floats if all_rounded.error > WORTH * few_floats.error else all_rounded


def _least_wrong(seen: Seen, weight: np.ndarray, floats: int) -> Rounding:
    widest = np.maximum(np.maximum(np.abs(seen.high), np.abs(seen.low)), LEAST)
    heaviest = np.maximum(np.abs(weight).max(1), LEAST)
    apart = np.sort(np.argsort(-widest)[:floats])
    even = np.ones(len(widest), bool)
    even[apart] = False
    size = float(np.square(seen.rows @ weight).sum()) or 1.0
    exact = seen.rows[:, even] @ weight[even]
    found: list[Rounding] = []
    for smoothing in SMOOTHINGS:
        unevenness = widest**smoothing / heaviest ** (1 - smoothing)
        evened = np.where(even, np.exp(np.log(unevenness).mean()) / unevenness, 0.0).astype(np.float32)
        top, bottom = max(float((seen.high * evened).max()), 0.0), min(float((seen.low * evened).min()), 0.0)
        scale = (top - bottom) / LEVELS or LEAST
        zero = round(-bottom / scale)
        read = ((np.clip(np.round(seen.rows * evened / scale) + zero, 0, LEVELS) - zero) * scale).astype(np.float32)
        integers, scales = _eight_bits(weight, evened)
        wrong = float(np.square(read @ (integers * scales) - exact).sum())
        found.append(Rounding(apart, evened, scale, zero, wrong / size))
    return min(found, key=lambda one: one.error)


def _eight_bits(weight: np.ndarray, evened: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight for the evened input, as integers, and the scale of each output."""
    even = np.divide(weight, evened[:, None], out=np.zeros_like(weight), where=evened[:, None] > 0)
    scale = np.maximum(np.abs(even).max(0), LEAST) / WEIGHT_LEVELS
    return np.round(even / scale).astype(np.int8), scale.astype(np.float32)


def _biases(
    graph: onnx.GraphProto, products: Mapping[str, onnx.NodeProto], constants: Mapping[str, np.ndarray]
) -> dict[str, tuple[onnx.NodeProto, str]]:
    """For each product that a constant is added to: that addition, and the constant's name."""
    found = {}
    for node in graph.node:
        if node.op_type == "Add":
            for result, added in (tuple(node.input), tuple(reversed(node.input))):
                if result in products and added in constants:
                    found[result] = (node, added)
    return found


class _Product(NamedTuple):
    """A matrix, what is added to each row, and what the result is called."""

    weight: np.ndarray
    bias: np.ndarray
    output: str


def _ending(node: Any, biases: Mapping[str, tuple[onnx.NodeProto, str]], constants: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    if node.output[0] in biases:
        add, name = biases[node.output[0]]
        return constants[name], add.output[0]
    return np.zeros(constants[node.input[1]].shape[1], np.float32), node.output[0]


def _nodes(name: str, together: Sequence[_Product], rounding: Rounding, kept: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Products of the input `name`: of 8 bits, but for the channels that stay floats."""
    weight = np.concatenate([one.weight for one in together], axis=1)
    integers, scales = _eight_bits(weight, rounding.evened)
    values = {
        "evened_by": rounding.evened,
        "scale": np.array(rounding.scale, np.float32),
        "zero": np.array(rounding.zero, np.uint8),
        "weight": integers,
        "weight_scale": scales,
        "weight_zero": np.zeros(len(scales), np.int8),
        "bias": np.concatenate([one.bias for one in together]),
    }
    told = {key: _constant(f"{name}_{key}", value, kept) for key, value in values.items()}
    rounded_by = [told[key] for key in ("weight", "scale", "weight_scale", "zero", "weight_zero", "bias")]
    result = together[0].output if len(together) == 1 else f"{name}_product"
    apart = len(rounding.floats) > 0
    nodes = [
        helper.make_node("Mul", [name, told["evened_by"]], [f"{name}_evened"]),
        helper.make_node("QuantizeLinear", [f"{name}_evened", told["scale"], told["zero"]], [f"{name}_rounded"]),
        helper.make_node(
            "MatMulIntegerToFloat", [f"{name}_rounded", *rounded_by], [f"{name}_most" if apart else result], domain=CONTRIBUTED
        ),
    ]
    if apart:
        which = _constant(f"{name}_which", rounding.floats.astype(np.int64), kept)
        floats = _constant(f"{name}_floats_weight", weight[rounding.floats], kept)
        nodes += [
            helper.make_node("Gather", [name, which], [f"{name}_floats"], axis=-1),
            helper.make_node("MatMul", [f"{name}_floats", floats], [f"{name}_rest"]),
            helper.make_node("Add", [f"{name}_most", f"{name}_rest"], [result]),
        ]
    if len(together) > 1:
        widths = _constant(f"{name}_widths", np.array([len(one.bias) for one in together], np.int64), kept)
        nodes.append(helper.make_node("Split", [result, widths], [one.output for one in together], axis=-1))
    return nodes


def _constant(name: str, value: np.ndarray, kept: list[onnx.TensorProto]) -> str:
    kept.append(numpy_helper.from_array(value, name))
    return name


def _replace(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto]) -> None:
    """Put the nodes in the place of the graph's own, with the constants they use."""
    graph = model.graph
    used = {name for node in nodes for name in node.input}
    stay = [one for one in graph.initializer if one.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*stay, *constants])
    if all(known.domain != CONTRIBUTED for known in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
