"""Finetune: one student from one file of answers, on CPU or GPU, one process or many, by the same loop.

The budget is turned into optimiser steps before the first one, so it does not depend on how busy the machine is. A probe early on
decides by a pure rule whether the rest is worth spending. Same data, recipe, seed, machine and thread count give the same adapter
digest, killed and resumed or not. This stage refuses to know what its answers are for and who will judge them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference import base, prompts
from training import checkpoints, encoding, examples, manifest, memory, objective, packing, recipe, schedule, settings, students, targets
from training import curve as curves
from training.checkpoints import Checkpoint, Progress
from training.examples import Example
from training.measure import Measure, measure
from training.packing import Sample
from training.recipe import FinetuneSettings, TrainingFailed
from training.students import Student
from tutelage.evolution.learnability import Learnability, judge
from tutelage.scoring import majority
from tutelage.settings import Home

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

MANIFEST = manifest.FILE
QUIET_STEPS = 8  # steps in a row with a mastered loss, after which it is worth looking whether the task is mastered


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.finetune", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of examples to learn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and its manifest")
    parser.add_argument("--validation", type=Path, help="JSONL of other examples: measures progress, decides the probe and early stopping")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--teacher", type=Path, help="a model folder with the same tokenizer, to learn the probabilities of")
    parser.add_argument("--teacher-adapter", type=Path, help="the teacher is this adapter on --teacher")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--config", type=Path, help="YAML with FinetuneSettings")
    how.add_argument("--preset", choices=recipe.PRESETS, help="a shipped recipe (default: balanced)")
    parser.add_argument("--curve", type=Path, help="CSV of loss by step, written while training (default: OUT/curve.csv)")
    arguments = parser.parse_args()
    settings.without_bars()
    written = finetune(
        arguments.data,
        arguments.out,
        validation=arguments.validation,
        base_dir=arguments.base or base.materialise(Home.from_environment().models),
        config=recipe.chosen(arguments.config, arguments.preset),
        curve=arguments.curve or arguments.out / "curve.csv",
        teacher=(arguments.teacher, arguments.teacher_adapter) if arguments.teacher else None,
    )
    print(f"finetune: {written['reason']}; student in {arguments.out}")


def finetune(
    data: Path,
    out: Path,
    *,
    validation: Path | None,
    base_dir: Path,
    config: FinetuneSettings,
    curve: Path,
    teacher: tuple[Path, Path | None] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a student on `data` and write it with its manifest to `out`; returns the manifest.

    Without `validation` there is no probe, no early stopping and no validation figure. An adapter of an unlearnable task is written
    too, with `"learnable": false`. `teacher` is a model folder and, if it has one, its adapter: its probabilities of every answer
    become soft targets. A run that was killed goes on from its checkpoint in `<out>.checkpoint` when it is started again.

    Raises:
        TrafficUnreadable: a row of `data` or `validation` cannot be read.
        TrainingFailed: there is nothing to learn from, the machine is too small, or training did not change every layer.
    """
    from accelerate import Accelerator

    rows = examples.read(data)
    held = examples.read(validation) if validation else []
    _use_threads(config.threads)
    accelerator = Accelerator(cpu=not base.has_gpu())
    tell = say if accelerator.is_main_process else _silent
    precision = base.detect_precision()
    tell(f"finetune: computing in {precision.dtype} on {accelerator.device}: {precision.reason}")
    tokenizer = base.load_tokenizer(base_dir)
    samples = _samples(rows, data, tokenizer, config, tell, taught=teacher is not None)
    needed = _room(samples, base_dir, config, precision, accelerator)
    tell(f"finetune: memory: {needed.reason}")
    memory.check(needed)
    student, samples = _prepared(samples, base_dir, config, precision, teacher, recompute=needed.recompute)
    before = students.norms(student)
    steps = schedule.plan(samples, config)
    tell(f"finetune: {len(samples)} examples, {len(steps)} optimiser steps")
    identity = manifest.identity(data, validation, base_dir, config, teacher)
    checkpoint = Checkpoint(out.with_name(f"{out.name}.checkpoint"), checkpoints.identity(**identity, threads=_threads()))
    progress = train(
        student,
        steps,
        validation=encoding.encode_answers(held, tokenizer, config) if held else [],
        majority_rate=majority([row.label for row in rows]).rate,
        config=config,
        accelerator=accelerator,
        checkpoint=checkpoint,
        curve=curve,
        say=tell,
    )
    students.check_moved(student, before)
    written = identity | manifest.outcome(progress, len(steps), samples) | {"precision": asdict(precision), "threads": _threads()}
    if accelerator.is_main_process:
        written |= {"template_hash": prompts.template_hash(tokenizer)}
        written |= _write(student, out, written, base_dir, config)
        checkpoint.remove()
    accelerator.wait_for_everyone()
    return written


def _write(student: Student, out: Path, known: Mapping[str, Any], base_dir: Path, config: FinetuneSettings) -> dict[str, Any]:
    """The student's files and its manifest; what the manifest says of them beside what is `known`."""
    students.save(student, out)
    origin = manifest.origin(out, base_dir, config)
    (out / MANIFEST).write_text(json.dumps({**known, **origin}, indent=2, sort_keys=True) + "\n")
    return origin


def train(
    student: Student,
    steps: Sequence[Sequence[Sample]],
    *,
    validation: Sequence[Sample],
    majority_rate: float,
    config: FinetuneSettings,
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    curve: Path,
    say: Callable[[str], None],
) -> Progress:
    """Run the planned steps from wherever the checkpoint stands, or stop when the rest would be wasted."""
    import torch

    weights = student.weights
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate_at(step, len(steps), config.warmup_share))
    progress, best_weights = checkpoint.restore(weights, optimizer, rate)
    if progress.step:
        say(f"finetune: going on from the checkpoint at step {progress.step}")
    if accelerator.is_main_process:
        curves.rewind(curve, progress.step)
    measuring = {"pass_tokens": config.pass_tokens, "accelerator": accelerator}
    if validation and progress.untrained is None:
        progress.untrained = measure(student, validation, **measuring)
    probe_at = schedule.probe_step(steps, config) if validation else 0
    measure_at = schedule.measure_steps(len(steps), config.validations) | {probe_at}
    earlier, started, earlier_cores, cpu = progress.seconds, time.monotonic(), progress.core_seconds, time.process_time()
    student.model.train()
    for number, batch in enumerate(steps[progress.step :], start=progress.step + 1):
        tokens = sum(sample.tokens for sample in batch)
        pairs = sum(sample.rejected is not None for sample in batch)
        loss = torch.zeros((), device=accelerator.device)
        for part in packing.split(batch, config.pass_tokens)[accelerator.process_index :: accelerator.num_processes]:
            pack = packing.pack(part, accelerator.device)
            # a share of the sum over the whole step, not a mean of means: passes of unequal size must not change the gradient
            part_loss = objective.loss(student.logits(pack), pack, config, tokens=tokens, pairs=pairs)
            part_loss.backward()
            loss += part_loss.detach()
        _sum_over_processes(accelerator, weights, loss)
        if not math.isfinite(loss.item()):
            raise TrainingFailed(f"the loss is {loss.item()} at step {number}; lower learning_rate (now {config.learning_rate})")
        torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
        used_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        progress.step, progress.tokens = number, progress.tokens + packing.cost(batch)
        progress.quiet = progress.quiet + 1 if loss.item() < config.mastered_loss else 0
        due = number in measure_at or progress.quiet == QUIET_STEPS
        seen = measure(student, validation, **measuring) if validation and due else None
        progress.seconds = earlier + time.monotonic() - started
        progress.core_seconds = earlier_cores + time.process_time() - cpu
        if accelerator.is_main_process:
            curves.note(curve, progress, loss.item(), used_rate, seen)
        if seen or number % 10 == 0:
            say(curves.line(progress, len(steps), loss.item(), seen))
        stop = None
        if seen:
            progress.final = seen
            if config.patience:
                progress.behind = 0 if seen.better_than(progress.best) else progress.behind + 1
                if not progress.behind:
                    progress.best, best_weights = seen, [weight.detach().clone() for weight in weights]
            if number == probe_at and progress.untrained:
                verdict = _probe(seen, progress.untrained, majority_rate, number, config)
                progress.verdict = asdict(verdict)
                say(f"finetune: probe: {verdict.reason}")
            stop = _reason_to_stop(progress, seen, config)
        if stop:
            say(f"finetune: {stop}")
            break
        if config.checkpoint_steps and number % config.checkpoint_steps == 0 and accelerator.is_main_process:
            checkpoint.write(progress, weights, best_weights, optimizer, rate)
    if best_weights and progress.best:
        with torch.no_grad():
            for weight, best in zip(weights, best_weights, strict=True):
                weight.copy_(best)
        progress.final = progress.best
    return progress


def _reason_to_stop(progress: Progress, seen: Measure, config: FinetuneSettings) -> str | None:
    if progress.verdict and not progress.verdict["learnable"]:
        return f"stopped by the probe at step {progress.step}"
    if seen.right == seen.n and seen.loss < config.mastered_loss:
        return f"mastered at step {progress.step}: all of {seen.n} validation items right at {seen.loss:.4f} nats a token"
    if config.patience and progress.behind >= config.patience:
        return f"stopped early at step {progress.step}: the last {progress.behind} measures were no better than {progress.best}"
    return None


def _sum_over_processes(accelerator: Accelerator, weights: Sequence[torch.Tensor], loss: torch.Tensor) -> None:
    """Add up what the processes found. By hand, for they have unequal numbers of passes, which DistributedDataParallel does not allow."""
    import torch

    if accelerator.num_processes == 1:
        return
    for weight in weights:
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        weight.grad = accelerator.reduce(gradient, "sum")
    loss.copy_(accelerator.reduce(loss, "sum"))


def _samples(
    rows: Sequence[Example], data: Path, tokenizer: Any, config: FinetuneSettings, say: Callable[[str], None], *, taught: bool
) -> list[Sample]:
    """The rows as samples, saying what of them is not learnt; `taught`: a local teacher is going to be asked about each."""
    if any(row.targets is not None for row in rows) and "targets" in examples.ASPECTS[config.strategy]:
        targets.check_origin(data, tokenizer)
    for name, count in encoding.unused(rows, config).items():
        say(f"finetune: {count} rows carry {name}, which the strategy {config.strategy} does not use")
    samples = encoding.encode(rows, tokenizer, config)
    plain = sum(row.targets is None for row in rows)
    if "targets" in examples.ASPECTS[config.strategy] and plain and not taught:
        say(f"finetune: {plain} of {len(rows)} rows have no soft targets and train on their text")
    return samples


def _room(
    samples: Sequence[Sample], base_dir: Path, config: FinetuneSettings, precision: base.Precision, accelerator: Accelerator
) -> memory.Estimate:
    compute_bytes = 2 if precision.dtype == "bfloat16" else 4
    packed = config.method == "qlora" and accelerator.device.type == "cuda"
    longest = max(len(sample) for sample in samples)
    share = max(len(sample.completion) / len(sample) for sample in samples)
    return memory.estimate(
        memory.shape_of(base_dir, rank=None if config.method == "full" else config.rank),
        weight_bytes=memory.NF4_BYTES if packed else compute_bytes,
        compute_bytes=compute_bytes,
        pass_tokens=max(config.pass_tokens, longest),
        supervised=round(max(config.pass_tokens, longest) * share),
        recompute=config.recompute,
        available=memory.available(accelerator.device),
    )


def _prepared(
    samples: list[Sample],
    base_dir: Path,
    config: FinetuneSettings,
    precision: base.Precision,
    teacher: tuple[Path, Path | None] | None,
    *,
    recompute: bool,
) -> tuple[Student, list[Sample]]:
    """The student with fresh weights, and the samples with what only a model can say of them."""
    from accelerate.utils import set_seed

    if teacher:
        samples = _taught(samples, *teacher, tokenizer=base.load_tokenizer(base_dir), config=config, precision=precision)
    blank = students.load(base_dir, config, precision)
    samples = objective.with_reference(blank, samples, pass_tokens=config.pass_tokens)
    set_seed(config.seed)  # only now: what came before may have drawn numbers
    student = students.adapted(blank, config)
    if recompute:
        students.recompute_activations(student)
    return student, samples


def _taught(
    samples: list[Sample], folder: Path, adapter: Path | None, *, tokenizer: Any, config: FinetuneSettings, precision: base.Precision
) -> list[Sample]:
    """The samples with a local teacher's probabilities; the teacher is let go before the student is loaded."""
    model = students.load(folder, config.model_copy(update={"method": "qlora" if adapter else "lora"}), precision)
    if targets.tokenizer_hash(model.tokenizer) != targets.tokenizer_hash(tokenizer):
        raise TrainingFailed(f"the teacher in {folder} has another tokenizer, so its probabilities are of other tokens; distil its text")
    if adapter:
        model = students.with_saved_adapter(model, adapter)
    top, temperature = config.teacher_top, config.distill_temperature
    return targets.of_teacher(model, samples, top=top, pass_tokens=config.pass_tokens, temperature=temperature)


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


def _silent(line: str) -> None:
    """What the processes beside the main one have to say."""


def _use_threads(threads: int) -> None:
    import torch

    if threads > 0:
        torch.set_num_threads(threads)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
