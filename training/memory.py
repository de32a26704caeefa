"""What a training will need in memory, before it starts: an estimate by formula and a verdict with its reason.

Pure but for `available`. It refuses to know data: the largest pass is given in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.recipe import TrainingFailed

GIB = 2**30
RESERVE = 1.15  # allocators and libraries take their share
TRAINED_BYTES = 16  # a float32 weight, its gradient, and Adam's two moments
NF4_BYTES = 0.5 + 1 / 64 + 1 / 256  # four bits, and double-quantised scales of 64 weights each (QLoRA, arXiv 2305.14314)
# Values of one token that a Llama layer with low-rank weights keeps for its backward pass, in widths of the hidden state and of the
# feed-forward layer. On SmolLM2-135M autograd was seen to keep 35.9 kB for each token and layer in bf16; this says 36.9.
KEPT_HIDDEN, KEPT_INNER = 16, 6


@dataclass(frozen=True)
class Shape:
    """What decides the size of a model: `parameters` in all, of which `embedding` in embedding and head, `trained` by this training."""

    parameters: int
    embedding: int
    trained: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose. `recompute`: whether activations are computed again in the backward pass to fit."""

    weights: float
    training: float
    activations: float
    logits: float
    recompute: bool
    available: float
    fits: bool
    reason: str

    @property
    def total(self) -> float:
        return (self.weights + self.training + self.activations + self.logits) * RESERVE


def estimate(
    shape: Shape,
    *,
    weight_bytes: float,
    compute_bytes: int,
    pass_tokens: int,
    supervised: int,
    recompute: Literal["auto", "on", "off"],
    available: float,
) -> Estimate:
    """Estimate a training whose largest pass has `pass_tokens` tokens of which `supervised` need logits.

    `weight_bytes` is that of a frozen linear weight, `compute_bytes` that of an activation. With `auto`,
    activations are kept while that fits.
    """
    held = (shape.parameters - shape.embedding) * weight_bytes + shape.embedding * compute_bytes
    frozen = 0.0 if shape.trained == shape.parameters else held
    training = float(shape.trained * TRAINED_BYTES)
    layer = pass_tokens * compute_bytes * (KEPT_HIDDEN * shape.hidden + KEPT_INNER * shape.inner)
    logits = 3.0 * 4 * supervised * shape.vocabulary  # float32 logits, their softmax, their gradient
    kept = {False: layer * shape.layers, True: layer + pass_tokens * compute_bytes * shape.hidden * shape.layers}
    totals = {again: (frozen + training + kept[again] + logits) * RESERVE for again in kept}
    again = recompute == "on" or (recompute == "auto" and totals[False] > available)
    fits = totals[again] <= available
    reason = (
        f"{totals[again] / GIB:.2f} GiB needed of {available / GIB:.2f} free: weights {frozen / GIB:.2f}, gradients and optimiser "
        f"{training / GIB:.2f}, activations {kept[again] / GIB:.2f}{' (recomputed)' if again else ''}, logits {logits / GIB:.2f}"
    )
    return Estimate(frozen, training, kept[again], logits, again, available, fits, reason)


def check(found: Estimate) -> None:
    """Raise TrainingFailed, saying what would help, when it cannot fit."""
    if not found.fits:
        raise TrainingFailed(
            f"this training does not fit: {found.reason}; lower pass_tokens or max_example_tokens, set recompute: auto, "
            "train low-rank weights (method: qlora) instead of all, or take a smaller base or a larger machine"
        )


def shape_of(base_dir: Path, *, rank: int | None) -> Shape:
    """The shape of a base, read without its weights; `rank` of low-rank weights on every linear layer, None to train all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base_dir), local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(weight.numel() for weight in model.parameters())
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    trained = total if rank is None else rank * sum(linear.in_features + linear.out_features for linear in linears)
    embedding = total - sum(weight.numel() for linear in linears for weight in linear.parameters())
    text = config.get_text_config()
    return Shape(total, embedding, trained, text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size)


def available(device: Any) -> float:
    """Bytes that are free on a torch device, or that this process may take of the machine's memory."""
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(min(psutil.virtual_memory().available, _allowance()))


def _allowance() -> float:
    """What the control group lets this process add; infinite where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else float(limit) - float(used)
    except OSError:
        return float("inf")
