"""A student to train: a base in a chosen precision with the weights that will change, and how it is saved.

Knows torch and PEFT. It refuses to know data, budgets and the loop.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference import base
from training import attention
from training.packing import Pack
from training.recipe import FinetuneSettings, TrainingFailed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Student:
    """A model with the tokenizer it came with; `precision` is what it computes in, whatever its trained weights are kept in."""

    model: Any
    tokenizer: Any
    precision: base.Precision

    @property
    def weights(self) -> list[torch.Tensor]:
        """What training changes, always in float32: steps are smaller than half precision can add."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def logits(self, pack: Pack) -> torch.Tensor:
        """One pass; float32 logits [supervised tokens, vocabulary]. No other position's are computed."""
        import torch

        half = torch.autocast(self.model.device.type, torch.bfloat16) if self.precision.dtype == "bfloat16" else nullcontext()
        with half:
            output = self.model(
                input_ids=pack.ids, position_ids=pack.positions, blocks=pack.blocks, logits_to_keep=pack.predicts, use_cache=False
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits


def load(base_dir: Path, config: FinetuneSettings, precision: base.Precision) -> Student:
    """The base, frozen and ready to be adapted (qlora, lora), or with every weight in float32 to be trained (full)."""
    if config.method == "full":
        model, tokenizer = base.load(base_dir, precision=base.Precision("float32", "weights that are trained"))
    else:
        # On a CPU the 4-bit weights are widened once, not at every step: the same values at 1.14 times the speed for more memory.
        nf4: base.Quantization = "nf4" if base.has_gpu() else "nf4-dequantized"
        model, tokenizer = base.load(base_dir, quantization=nf4 if config.method == "qlora" else "none", precision=precision)
    model.set_attn_implementation(attention.register())
    return Student(model, tokenizer, precision)


def adapted(student: Student, config: FinetuneSettings) -> Student:
    """The frozen base with fresh low-rank weights on every linear layer; with `full`, the base itself."""
    from peft import LoraConfig, get_peft_model

    if config.method == "full":
        student.model.requires_grad_(True)
        return student
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(student.model, lora)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # PEFT would compute the low-rank product in float32; autocast does it in the precision of the rest, from float32 weights
            module.cast_input_dtype_enabled = False
    return Student(model, student.tokenizer, student.precision)


def with_saved_adapter(student: Student, folder: Path) -> Student:
    """The base with an adapter that was saved, frozen. Raises AdapterRejected when it belongs to another base."""
    from peft import PeftModel

    return Student(PeftModel.from_pretrained(student.model, str(folder)), student.tokenizer, student.precision)


def recompute_activations(student: Student) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again: a third more time, a fraction of the memory."""
    student.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def norms(student: Student) -> dict[str, float]:
    """The norm of every trained weight, by name, to see later that it moved."""
    return {name: weight.detach().double().norm().item() for name, weight in student.model.named_parameters() if weight.requires_grad}


def check_moved(student: Student, before: dict[str, float]) -> None:
    """Refuse weights that did not train or are not finite: every `lora_B` starts at zero and must have left it, every matrix must differ.

    Raises TrainingFailed.
    """
    after = norms(student)
    stuck = [name for name, norm in after.items() if "lora_A" not in name and (norm == before[name] or not norm < math.inf)]
    if stuck:
        raise TrainingFailed(f"{len(stuck)} layers did not train, such as {stuck[0]}: gradients are lost on the way; do not use it")


def save(student: Student, out: Path) -> None:
    """An adapter in `out`; a student trained in full is a base of its own, as bfloat16 with its tokenizer."""
    import torch
    from peft import PeftModel

    out.mkdir(parents=True, exist_ok=True)
    if isinstance(student.model, PeftModel):
        student.model.save_pretrained(str(out), safe_serialization=True)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; the registry holds the real description
    else:
        student.model.to(torch.bfloat16).save_pretrained(str(out))
        student.tokenizer.save_pretrained(str(out))
