"""A recipe: how a student is trained, as strict settings, with three that are shipped by name.

Values and their meaning only; it refuses to know data, models and the loop that follows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from training import losses, settings
from tutelage.errors import TutelageError
from tutelage.settings import CHECKOUT, Strict

Preset = Literal["fast", "balanced", "quality"]
PRESETS: tuple[Preset, ...] = ("fast", "balanced", "quality")
PRESET_DIR = CHECKOUT / "configs" / "presets"


class FinetuneSettings(Strict):
    """How a student is trained. Tokens are those computed: a beginning that all prompts of a pass share counts once.

    `method`: low-rank weights on a base in 4 bits (qlora) or as it is (lora), or every weight (full). `strategy`: learn from answers
    alone (response), or also from a teacher's probabilities (soft-targets), from rationales (reasoning), from weights and rejected answers
    (metric-aware), or from whatever a row carries (multi-aspect).
    `budget_tokens` null: `max_epochs` alone decides. Training ends early when every validation item is right at less than
    `mastered_loss` nats a token, or when `patience` measures in a row (0: any number) found nothing better; then the best is kept.
    `pass_tokens` bounds the memory of one forward pass and, like `recompute` (of activations in the backward pass; auto: when they
    would not fit) and `checkpoint_steps` (0: never), changes nothing else. `teacher_top`: probabilities kept of a local teacher a token.
    """

    seed: int = 0
    method: Literal["qlora", "lora", "full"] = "qlora"
    strategy: Literal["response", "soft-targets", "reasoning", "metric-aware", "multi-aspect"] = "response"
    rank: int = Field(default=16, ge=1, le=64)
    alpha: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    step_examples: int = Field(default=2, ge=1)
    step_tokens: int = Field(default=160, ge=1)
    budget_tokens: int | None = Field(default=20_000, ge=1)
    least_examples: int = Field(default=760, ge=0)
    max_epochs: int = Field(default=4, ge=1)
    pass_tokens: int = Field(default=512, ge=1)
    max_example_tokens: int = Field(default=2048, ge=2)
    probe_tokens: int = Field(default=7_000, ge=0)
    least_gain: float = Field(default=0.15, gt=0, lt=1)
    validations: int = Field(default=3, ge=1)
    mastered_loss: float = Field(default=0.02, ge=0)
    patience: int = Field(default=0, ge=0)
    checkpoint_steps: int = Field(default=50, ge=0)
    recompute: Literal["auto", "on", "off"] = "auto"
    distill_temperature: float = Field(default=losses.TEMPERATURE, gt=0)
    distill_alpha: float = Field(default=losses.ALPHA, ge=0, le=1)
    distill_direction: losses.Direction = "forward"
    teacher_top: int = Field(default=64, ge=1)
    rationale_weight: float = Field(default=0.5, ge=0)
    preference_weight: float = Field(default=0.2, ge=0)
    preference_beta: float = Field(default=0.1, gt=0)
    threads: int = Field(default=0, ge=0)


class OnPolicySettings(Strict):
    """How a student is corrected on its own answers.

    `divergence`: 0 is forward KL, 1 reverse KL, between them generalised Jensen-Shannon. `temperature` is that of its answers and of the
    loss; no answer is longer than `most_tokens`.
    """

    seed: int = 0
    method: Literal["on-policy"] = "on-policy"
    steps: int = Field(default=60, ge=1)
    step_examples: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    divergence: float = Field(default=1.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    most_tokens: int = Field(default=64, ge=1)


Recipe = FinetuneSettings | OnPolicySettings


class TrainingFailed(TutelageError):
    """The data or the trained weights cannot be right, or the machine is too small; the message says why and what to do."""

    code = "training_failed"


def preset(name: Preset) -> FinetuneSettings:
    """The shipped recipe of that name."""
    return settings.read(FinetuneSettings, PRESET_DIR / f"{name}.yaml")


def chosen(config: Path | None, name: Preset | None) -> FinetuneSettings:
    """The recipe in the file `config` or the shipped one of that name; `balanced` when neither is given."""
    return settings.read(FinetuneSettings, config) if config else preset(name or "balanced")
