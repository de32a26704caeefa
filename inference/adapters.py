"""LoRA adapters as files: read, checked and identified by digest before any of it reaches a model.

Knows safetensors and JSON. It refuses to know torch, and it refuses every adapter that could run code, belongs to
another base or changes more than low-rank weights.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import AdapterRejected

__all__ = ["AdapterInfo", "AdapterRejected", "VerifiedAdapter", "digest", "open_verified", "verify"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
CODE_CARRYING = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py"})
FLOAT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}

# The fields of adapter_config.json that change what the adapter computes; the rest is how it was trained or saved.
FUNCTION_FIELDS = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Accepted only when unset: each one changes more than low-rank weights, or cannot be batched with other adapters.
MUST_BE_UNSET = (
    "alora_invocation_tokens",
    "arrow_config",
    "auto_mapping",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a verified adapter. `path` is absolute; `rank` is LoRA's r; `parameters` counts weights."""

    path: Path
    digest: str
    base_fingerprint: str
    rank: int
    parameters: int


@dataclass(frozen=True)
class VerifiedAdapter:
    """An adapter that passed every check, with the very bytes that were checked."""

    info: AdapterInfo
    config: dict[str, Any]
    weights: bytes


def digest(adapter_dir: Path) -> str:
    """Return the sha256 (hex) of what the adapter computes: its tensors and the settings that change the function.

    Independent of file order, of the order of target modules and of training-only settings.
    Raises AdapterRejected when the files cannot be read.
    """
    config = _read_json(adapter_dir / CONFIG)
    return _digest(config, _tensors(_read_bytes(adapter_dir / WEIGHTS)))


def verify(adapter_dir: Path, *, digest: str, base_fingerprint: str) -> AdapterInfo:
    """Check an adapter folder against the digest and base it is said to have. Raises AdapterRejected."""
    return open_verified(adapter_dir, digest=digest, base_fingerprint=base_fingerprint).info


def open_verified(adapter_dir: Path, *, digest: str, base_fingerprint: str) -> VerifiedAdapter:
    """Read an adapter once, check those bytes, and return them, so that what was checked is what gets loaded.

    Raises AdapterRejected when files are missing, could carry code, are not LoRA, hold non-finite values, belong to
    another base, or do not have the expected digest.
    """
    _refuse_code(adapter_dir)
    config = _read_json(adapter_dir / CONFIG)
    weights = _read_bytes(adapter_dir / WEIGHTS)
    manifest = _read_json(adapter_dir / MANIFEST)
    _check_config(config)
    _check_base(manifest, base_fingerprint)
    tensors = _tensors(weights)
    _check_tensors(tensors)
    found = _digest(config, tensors)
    if not hmac.compare_digest(found, digest):
        raise AdapterRejected(
            f"adapter digest is {found}, expected {digest}: the files changed or are not the ones that were evaluated; "
            "load the adapter by the digest in its registry entry, or evaluate and publish it again"
        )
    parameters = sum(math.prod(tensor["shape"]) for _, tensor in tensors)
    info = AdapterInfo(adapter_dir.resolve(), found, base_fingerprint, int(config["r"]), parameters)
    return VerifiedAdapter(info, config, weights)


def _digest(config: dict[str, Any], tensors: list[tuple[str, dict[str, Any]]]) -> str:
    function = {field: _sorted(config.get(field)) for field in FUNCTION_FIELDS}
    total = hashlib.sha256(json.dumps(function, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in tensors:
        data = hashlib.sha256(tensor["data"]).hexdigest()
        total.update(json.dumps([name, tensor["dtype"], tensor["shape"], data]).encode())
    return total.hexdigest()


def _sorted(value: Any) -> Any:
    # PEFT writes target modules from a set, in any order.
    return sorted(value) if isinstance(value, list) else value


def _tensors(weights: bytes) -> list[tuple[str, dict[str, Any]]]:
    from safetensors import SafetensorError, deserialize

    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(weights)  # type: ignore[no-untyped-call]
        return sorted(found, key=lambda item: item[0])
    except SafetensorError as error:
        raise AdapterRejected(f"{WEIGHTS} is not a readable safetensors file ({error}); copy it again") from error


def _check_tensors(tensors: list[tuple[str, dict[str, Any]]]) -> None:
    if not tensors:
        raise AdapterRejected(f"{WEIGHTS} holds no tensors; an adapter has lora_A and lora_B for every target module")
    for name, tensor in tensors:
        if ".lora_A." not in name and ".lora_B." not in name:
            raise AdapterRejected(f"tensor {name!r} is no LoRA weight; allowed are lora_A and lora_B only")
        if tensor["dtype"] not in FLOAT_BITS:
            raise AdapterRejected(f"tensor {name!r} is {tensor['dtype']}; allowed are {', '.join(FLOAT_BITS)}")
        if not _finite(tensor["dtype"], tensor["data"]):
            raise AdapterRejected(f"tensor {name!r} holds NaN or infinite values; the training diverged, train again")


def _finite(dtype: str, data: bytes) -> bool:
    import numpy

    if dtype == "BF16":  # numpy has no bfloat16: all exponent bits set means NaN or infinity
        return not bool(((numpy.frombuffer(data, numpy.uint16) & 0x7F80) == 0x7F80).any())
    return bool(numpy.isfinite(numpy.frombuffer(data, f"<f{FLOAT_BITS[dtype] // 8}")).all())


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterRejected(f"{CONFIG}: peft_type is {config.get('peft_type')!r}; allowed is 'LORA'")
    if config.get("bias", "none") != "none":
        raise AdapterRejected(f"{CONFIG}: bias is {config['bias']!r}; allowed is 'none'")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AdapterRejected(f"{CONFIG}: r is {config.get('r')!r}; allowed is a whole number from 1 up")
    for field in MUST_BE_UNSET:
        if config.get(field):
            raise AdapterRejected(f"{CONFIG}: {field} is set to {config[field]!r}; it must be unset: train without it")


def _check_base(manifest: dict[str, Any], base_fingerprint: str) -> None:
    found = manifest.get("base_fingerprint")
    if not isinstance(found, str) or not hmac.compare_digest(found, base_fingerprint):
        raise AdapterRejected(
            f"the adapter was trained on base {found!r}, this base is {base_fingerprint!r}; "
            "load it where its own base is served, or train it again on this one"
        )


def _refuse_code(adapter_dir: Path) -> None:
    if not adapter_dir.is_dir():
        raise AdapterRejected(f"{adapter_dir} is not a folder; name a folder with {WEIGHTS}, {CONFIG} and {MANIFEST}")
    carrying = sorted(path.name for path in adapter_dir.iterdir() if path.suffix in CODE_CARRYING)
    if carrying:
        raise AdapterRejected(
            f"{adapter_dir} holds {', '.join(carrying)}, which could carry code; "
            f"an adapter is {WEIGHTS}, {CONFIG} and {MANIFEST}: remove the rest"
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterRejected(f"cannot read {path}: {error.strerror}; an adapter needs this file") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except ValueError as error:
        raise AdapterRejected(f"{path} is not JSON ({error}); write the adapter again") from error
    if not isinstance(value, dict):
        raise AdapterRejected(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
