"""A fresh adapter: what a student begins with. Its output weights are zero, so it answers as the bare base does until it is trained.

Knows safetensors and PEFT's file format. It refuses to know torch, so that one is made in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference import adapters, base

RANK = 4  # of no consequence while the output weights are zero; small files load at once
LINEAR = ".weight"


def write(base_dir: Path, out: Path, *, name: str) -> str:
    """Write a fresh LoRA adapter of every linear layer of the base, with its manifest, to `out`; its digest. `name` seeds the input
    weights, drawn as PEFT draws them: uniform within 1 / sqrt(inputs) of zero (Kaiming with a = sqrt 5).

    Raises BaseUnavailable when the folder is not a complete checkpoint.
    """
    import numpy
    from safetensors.numpy import save_file

    fingerprint = base.fingerprint(base_dir)
    random = numpy.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    weights: dict[str, Any] = {}
    modules: set[str] = set()
    for module, outputs, inputs in _linear(base_dir):
        bound = 1 / math.sqrt(inputs)
        weights[f"base_model.model.{module}.lora_A.weight"] = random.uniform(-bound, bound, (RANK, inputs)).astype("f4")
        weights[f"base_model.model.{module}.lora_B.weight"] = numpy.zeros((outputs, RANK), "f4")
        modules.add(module.rsplit(".", 1)[-1])
    if not weights:
        raise base.BaseUnavailable(f"{base_dir} has no linear layer of a transformer block to adapt")
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(out / adapters.WEIGHTS))
    (out / adapters.CONFIG).write_text(json.dumps(_config(sorted(modules)), indent=2))
    manifest = {"base": base_dir.name, "base_fingerprint": fingerprint, "reason": "fresh: not trained yet"}
    digest = adapters.digest(out)
    (out / adapters.MANIFEST).write_text(json.dumps(manifest | {"adapter_digest": digest}, indent=2))
    return digest


def _config(modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "bias": "none",
        "target_modules": modules, "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False,
    }  # fmt: skip


def _linear(base_dir: Path) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix inside the transformer's blocks, from the headers of its files alone."""
    for file in sorted(base_dir.glob("*.safetensors")):
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for tensor, facts in sorted(header.items()):
            if tensor != "__metadata__" and ".layers." in tensor and tensor.endswith(LINEAR) and len(facts["shape"]) == 2:
                yield tensor.removesuffix(LINEAR), facts["shape"][0], facts["shape"][1]
