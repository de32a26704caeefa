"""Finetune: QLoRA of one base on one file of answers, on CPU or GPU by the same loop.

The budget is counted in tokens and turned into optimiser steps before the first one, so it does not depend on how busy the
machine is. A probe early on decides by a pure rule whether the rest is worth spending. Same data, settings, seed, machine
and thread count give the same adapter digest. This stage refuses to know what its answers are for and who will judge them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import Field

from inference import adapters, base, prompts
from training import examples, packing, settings
from training.examples import Example
from training.packing import Sample
from tutelage.errors import TutelageError
from tutelage.evolution.learnability import Learnability, judge
from tutelage.scoring import majority
from tutelage.settings import Home, Strict

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from peft import PeftModel

MANIFEST = "manifest.json"
MOST_EXTRA = 1.8  # of the token budget, for tasks whose examples are long or many
QUIET_STEPS = 8  # steps in a row with a mastered loss, after which it is worth looking whether the task is mastered
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


class FinetuneSettings(Strict):
    """How a student is trained. Tokens are those computed: a beginning that all prompts of a step share counts once.

    Training ends early when every validation item is right at less than `mastered_loss` nats a token.
    `pass_tokens` bounds the memory of one forward pass and changes nothing else.
    """

    seed: int = 0
    rank: int = Field(default=16, ge=1, le=64)
    alpha: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    step_examples: int = Field(default=2, ge=1)
    step_tokens: int = Field(default=160, ge=1)
    budget_tokens: int = Field(default=20_000, ge=1)
    least_examples: int = Field(default=760, ge=0)
    max_epochs: int = Field(default=4, ge=1)
    pass_tokens: int = Field(default=512, ge=1)
    max_example_tokens: int = Field(default=2048, ge=2)
    probe_tokens: int = Field(default=7_000, ge=0)
    least_gain: float = Field(default=0.15, gt=0, lt=1)
    validations: int = Field(default=3, ge=1)
    mastered_loss: float = Field(default=0.02, ge=0)
    threads: int = Field(default=0, ge=0)


class TrainingFailed(TutelageError):
    """The data or the trained weights cannot be right; the message says why and what to check."""

    code = "training_failed"


@dataclass(frozen=True)
class Measure:
    """The student on the validation items with the right prefix given: share exactly right, mean loss per token (nats)."""

    accuracy: float
    right: int
    n: int
    loss: float


@dataclass(frozen=True)
class Outcome:
    """How a training went: optimiser steps taken of those planned, tokens computed, the probe's verdict if there was one."""

    steps: int
    planned_steps: int
    tokens: int
    seconds: float
    verdict: Learnability | None
    untrained: Measure | None
    final: Measure | None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.finetune", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of examples to learn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and its manifest")
    parser.add_argument("--validation", type=Path, help="JSONL of other examples: measures progress and decides the probe")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--config", type=Path, help="YAML with FinetuneSettings")
    parser.add_argument("--curve", type=Path, help="JSONL of loss by step, written while training (default: OUT/curve.jsonl)")
    arguments = parser.parse_args()
    settings.without_bars()
    manifest = finetune(
        arguments.data,
        arguments.out,
        validation=arguments.validation,
        base_dir=arguments.base or base.materialise(Home.from_environment().models),
        config=settings.read(FinetuneSettings, arguments.config),
        curve=arguments.curve or arguments.out / "curve.jsonl",
    )
    print(f"finetune: {manifest['reason']}; adapter in {arguments.out}")


def finetune(
    data: Path,
    out: Path,
    *,
    validation: Path | None,
    base_dir: Path,
    config: FinetuneSettings,
    curve: Path,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train an adapter on `data` and write it with its manifest to `out`; returns the manifest.

    Without `validation` there is no probe and no validation figure. An adapter of an unlearnable task is written too, with
    `"learnable": false`.

    Raises:
        TrafficUnreadable: a row of `data` or `validation` cannot be read.
        TrainingFailed: there is nothing to learn from, or training did not change every adapted layer.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    rows = examples.read(data)
    held = examples.read(validation) if validation else []
    set_seed(config.seed)
    _use_threads(config.threads)
    accelerator = Accelerator(cpu=not _has_gpu())
    precision = base.detect_precision()
    say(f"finetune: computing in {precision.dtype} on {accelerator.device}: {precision.reason}")
    # On a CPU the 4-bit weights are widened once, not at every step: the same values at 1.14 times the speed for more memory.
    quantization: base.Quantization = "nf4" if _has_gpu() else "nf4-dequantized"
    model, tokenizer = base.load(base_dir, quantization=quantization, precision=precision)
    samples = encode(rows, tokenizer, config)
    steps = plan(samples, config)
    say(f"finetune: {len(samples)} examples, {len(steps)} optimiser steps")
    student = with_adapter(model, config)
    out.mkdir(parents=True, exist_ok=True)
    curve.parent.mkdir(parents=True, exist_ok=True)
    with curve.open("w") as log:
        outcome = train(
            student,
            steps,
            validation=encode(held, tokenizer, config) if held else [],
            majority_rate=majority([row.label for row in rows]).rate,
            config=config,
            accelerator=accelerator,
            log=log,
            say=say,
        )
    check_moved(student)
    student.save_pretrained(str(out), safe_serialization=True)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; the registry holds the real description
    manifest = _manifest(outcome, data=data, out=out, base_dir=base_dir, config=config, samples=samples) | {
        "template_hash": prompts.template_hash(tokenizer),
        "precision": asdict(precision),
        "threads": _threads(),
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def encode(rows: Sequence[Example], tokenizer: Any, config: FinetuneSettings) -> list[Sample]:
    """Rows as token ids by the one render that serving uses; rows too long for the settings are left out.

    Raises TrainingFailed when nothing is left or the masks cannot be right.
    """
    samples = [Sample(tuple(prompts.render(tokenizer, row.prompt)), tuple(prompts.completion_ids(tokenizer, row.answer))) for row in rows]
    kept = [sample for sample in samples if len(sample) <= config.max_example_tokens]
    if not kept:
        raise TrainingFailed(
            f"none of {len(samples)} examples fits max_example_tokens={config.max_example_tokens}; raise it or send shorter traffic"
        )
    check_masks(kept, stop_id=prompts.stop_id(tokenizer))
    return kept


def check_masks(samples: Sequence[Sample], *, stop_id: int) -> None:
    """Refuse data whose supervised part is empty, everything, or does not end with the stop token: it would train silently wrong."""
    for index, sample in enumerate(samples):
        if not sample.completion:
            raise TrainingFailed(f"example {index} has no supervised token; its answer renders to nothing, drop the row")
        if not sample.prompt:
            raise TrainingFailed(f"example {index} has only supervised tokens; its prompt renders to nothing, check the chat template")
        if sample.completion[-1] != stop_id or stop_id in sample.completion[:-1]:
            raise TrainingFailed(
                f"example {index} does not end with the one stop token {stop_id}, so the student would not learn to stop; "
                "check inference.prompts.completion_ids against the base's tokenizer"
            )


def plan(samples: Sequence[Sample], config: FinetuneSettings) -> list[list[Sample]]:
    """The examples of every optimiser step: shuffled epochs until the token budget or the epochs are used up.

    A step takes examples until it has both `step_examples` of them and `step_tokens` tokens, so short tasks learn from more
    examples a step and long ones from more steps, at about the same cost. A task of longer or of more examples may go over
    the budget, up to MOST_EXTRA times, until it has seen each of them once and `least_examples` in all.
    """
    steps: list[list[Sample]] = []
    batch: list[Sample] = []
    spent, seen = 0, 0
    for sample in _shuffled_epochs(samples, config):
        batch.append(sample)
        tokens = packing.cost(batch)
        if len(batch) < config.step_examples or tokens < config.step_tokens:
            continue
        spent += tokens
        seen += len(batch)
        enough = seen > max(config.least_examples, len(samples)) or spent > MOST_EXTRA * config.budget_tokens
        if spent > config.budget_tokens and enough and steps:
            return steps
        steps.append(batch)
        batch = []
    return steps or [batch]


def _shuffled_epochs(samples: Sequence[Sample], config: FinetuneSettings) -> Iterator[Sample]:
    import datasets

    table = datasets.Dataset.from_dict({"prompt": [s.prompt for s in samples], "completion": [s.completion for s in samples]})
    for epoch in range(config.max_epochs):
        for row in table.shuffle(seed=config.seed + epoch):
            yield Sample(tuple(row["prompt"]), tuple(row["completion"]))


def with_adapter(model: Any, config: FinetuneSettings) -> PeftModel:
    """The frozen base with fresh low-rank weights on every linear layer, kept in float32 whatever the base computes in."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def train(
    student: PeftModel,
    steps: Sequence[Sequence[Sample]],
    *,
    validation: Sequence[Sample],
    majority_rate: float,
    config: FinetuneSettings,
    accelerator: Accelerator,
    log: TextIO,
    say: Callable[[str], None],
) -> Outcome:
    """Run the planned steps, or stop at the probe when it says that the rest would be wasted."""
    import torch

    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, len(steps), config.warmup_share))
    student, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)
    untrained = measure(student, validation, config) if validation else None
    probe_at = _probe_step(steps, config) if validation else 0
    measure_at = {math.ceil(len(steps) * (i + 1) / config.validations) for i in range(config.validations)} | {probe_at}
    verdict, final, spent, quiet, started = None, None, 0, 0, time.monotonic()
    student.train()
    for number, batch in enumerate(steps, start=1):
        spent += packing.cost(batch)
        supervised = sum(len(sample.completion) for sample in batch)
        loss = 0.0
        for part in packing.split(batch, config.pass_tokens):
            logits, pack = forward(student, part)
            # the sum over the step's tokens, not a mean of means: passes of unequal size must not change the gradient
            part_loss = torch.nn.functional.cross_entropy(logits, pack.targets, reduction="sum") / supervised
            accelerator.backward(part_loss)
            loss += part_loss.item()
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} at step {number}; lower learning_rate (now {config.learning_rate})")
        accelerator.clip_grad_norm_(weights, config.clip_norm)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        quiet = quiet + 1 if loss < config.mastered_loss else 0
        due = number in measure_at or quiet == QUIET_STEPS
        final = measure(student, validation, config) if validation and due else None
        seconds = time.monotonic() - started
        _note(log, number, loss, rate, final, seconds, spent)
        if final or number % 10 == 0:
            say(_progress(number, len(steps), loss, final, seconds, spent))
        if final and untrained and number == probe_at:
            verdict = _probe(final, untrained, majority_rate, number, config)
            say(f"finetune: probe: {verdict.reason}")
            if not verdict.learnable:
                break
        if final and final.right == final.n and final.loss < config.mastered_loss:
            say(f"finetune: mastered at step {number}: all of {final.n} validation items right at {final.loss:.4f} nats a token")
            break
    return Outcome(number, len(steps), spent, time.monotonic() - started, verdict, untrained, final)


def _probe(seen: Measure, untrained: Measure, majority_rate: float, steps: int, config: FinetuneSettings) -> Learnability:
    return judge(
        seen.right,
        seen.n,
        majority=majority_rate,
        untrained=untrained.accuracy,
        steps=steps,
        least_gain=config.least_gain,
        token_probability=math.exp(-seen.loss),
    )


def rate_at(step: int, steps: int, warmup_share: float) -> float:
    """Share of the learning rate at a step (from 0): linear up, then half a cosine down to nearly nothing."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def forward(student: Any, part: Sequence[Sample]) -> tuple[torch.Tensor, packing.Pack]:
    """One pass; returns float32 logits [supervised tokens, vocabulary] and the pack they belong to."""
    pack = packing.pack(part, student.device)
    output = student(
        input_ids=pack.ids, position_ids=pack.positions, attention_mask=pack.mask, logits_to_keep=pack.predicts, use_cache=False
    )
    return output.logits[0].float(), pack


def measure(student: Any, samples: Sequence[Sample], config: FinetuneSettings) -> Measure:
    """Exact answers and loss without generating: an answer is exact if every token of it would have been chosen greedily."""
    import torch

    was_training = student.training
    student.eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for part in packing.split(samples, config.pass_tokens):
            logits, pack = forward(student, part)
            loss += torch.nn.functional.cross_entropy(logits, pack.targets, reduction="sum").item()
            missed = pack.rows[logits.argmax(dim=-1) != pack.targets]
            right += len(part) - len(set(missed.tolist()))
    student.train(was_training)
    tokens = sum(len(sample.completion) for sample in samples)
    return Measure(right / len(samples), right, len(samples), loss / tokens)


def check_moved(student: PeftModel) -> None:
    """Every `lora_B` starts at zero: one that still is zero, or is not finite, was not trained. Raises TrainingFailed."""
    bad = [name for name, weight in student.named_parameters() if "lora_B" in name and not 0 < weight.norm().item() < math.inf]
    if bad:
        raise TrainingFailed(
            f"{len(bad)} adapted layers did not train, such as {bad[0]}: gradients are lost on the way; do not use this adapter"
        )


def _probe_step(steps: Sequence[Sequence[Sample]], config: FinetuneSettings) -> int:
    """The first step after which `probe_tokens` have been computed; 0 (never) when the whole training is no longer than that."""
    spent = 0
    for number, batch in enumerate(steps[:-1], start=1):
        spent += packing.cost(batch)
        if spent >= config.probe_tokens > 0:
            return number
    return 0


def _note(log: TextIO, step: int, loss: float, rate: float, measured: Measure | None, seconds: float, tokens: int) -> None:
    row: dict[str, float | int] = {"step": step, "loss": loss, "lr": rate, "tokens": tokens, "seconds": round(seconds, 2)}
    if measured:
        row |= {"val_loss": measured.loss, "val_accuracy": measured.accuracy}
    log.write(json.dumps(row) + "\n")
    log.flush()


def _progress(step: int, steps: int, loss: float, measured: Measure | None, seconds: float, tokens: int) -> str:
    seen = f", validation {measured.right}/{measured.n} right" if measured else ""
    return f"finetune: step {step}/{steps}, loss {loss:.3f}{seen}, {tokens / max(seconds, 1e-9):.0f} tokens/s, {seconds:.0f} s"


def _manifest(
    outcome: Outcome, *, data: Path, out: Path, base_dir: Path, config: FinetuneSettings, samples: Sequence[Sample]
) -> dict[str, Any]:
    from importlib.metadata import version

    verdict = outcome.verdict
    return {
        "base": base_dir.name,
        "base_fingerprint": base.fingerprint(base_dir),
        "adapter_digest": adapters.digest(out),
        "data_digest": hashlib.sha256(data.read_bytes()).hexdigest(),
        "seed": config.seed,
        "settings": config.model_dump(),
        "learnable": verdict.learnable if verdict else None,
        "reason": verdict.reason if verdict else f"trained for {outcome.steps} steps without a probe",
        "metrics": _metrics(outcome, samples),
        "max_answer_tokens": max(len(sample.completion) for sample in samples),
        "versions": {name: version(name) for name in VERSIONED},
    }


def _metrics(outcome: Outcome, samples: Sequence[Sample]) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {
        "examples": len(samples),
        "steps": outcome.steps,
        "planned_steps": outcome.planned_steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "tokens_per_second": round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
    }
    for name, measured in (("untrained", outcome.untrained), ("final", outcome.final)):
        if measured:
            metrics |= {f"{name}_val_accuracy": measured.accuracy, f"{name}_val_loss": measured.loss}
    return metrics


def _use_threads(threads: int) -> None:
    import torch

    if threads > 0:
        torch.set_num_threads(threads)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
