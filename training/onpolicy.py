"""On-policy distillation: a trained student answers by itself and learns a teacher's probabilities of what it said (Agarwal et al. 2024,
arXiv 2306.13649), by TRL's DistillationTrainer. For mistakes that only the student makes, which no answer on record corrects.

Starts from an adapter of `training.finetune` and writes another with its manifest, to be evaluated and promoted like any. An extra:
`pip install 'tutelage[on-policy]'`. It refuses to know where prompts came from and who will judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference import adapters, base, prompts
from training import curve as curves
from training import examples, manifest, settings, students, targets
from training.checkpoints import Progress
from training.recipe import OnPolicySettings, TrainingFailed
from training.students import Student
from tutelage.settings import Home

if TYPE_CHECKING:
    from trl import DistillationTrainer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.onpolicy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of examples; only their prompts are used")
    parser.add_argument("--adapter", type=Path, required=True, help="the student to correct")
    parser.add_argument("--out", type=Path, required=True, help="folder for its corrected adapter, manifest and curve")
    parser.add_argument("--teacher", type=Path, required=True, help="a model folder with the same tokenizer")
    parser.add_argument("--teacher-adapter", type=Path, help="the teacher is this adapter on --teacher")
    parser.add_argument("--base", type=Path, help="the student's base folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--config", type=Path, help="YAML with OnPolicySettings")
    arguments = parser.parse_args()
    settings.without_bars()
    written = distil(
        arguments.data,
        arguments.adapter,
        arguments.out,
        base_dir=arguments.base or base.materialise(Home.from_environment().models),
        teacher=(arguments.teacher, arguments.teacher_adapter),
        config=settings.read(OnPolicySettings, arguments.config),
    )
    print(f"onpolicy: {written['reason']}; student in {arguments.out}")


def distil(
    data: Path,
    adapter: Path,
    out: Path,
    *,
    base_dir: Path,
    teacher: tuple[Path, Path | None],
    config: OnPolicySettings,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Correct the student in `adapter` and write it to `out`; returns its manifest.

    Raises:
        TrafficUnreadable: a row of `data` cannot be read.
        AdapterRejected: an adapter belongs to another base.
        TrainingFailed: the extra is not installed, the teacher has another tokenizer, or training did not change every layer.
    """
    if importlib.util.find_spec("trl") is None:
        raise TrainingFailed("on-policy distillation is an extra that is not installed here; run: pip install 'tutelage[on-policy]'")
    precision = base.detect_precision()
    say(f"onpolicy: computing in {precision.dtype}: {precision.reason}")
    student = _student(base_dir, adapter, precision)
    taught_by = _teacher(*teacher, precision)
    if targets.tokenizer_hash(taught_by.tokenizer) != targets.tokenizer_hash(student.tokenizer):
        raise TrainingFailed(f"the teacher in {teacher[0]} has another tokenizer than the base in {base_dir}; name one with the same")
    before = students.norms(student)
    started, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(student, taught_by, examples.read(data), config, Path(folder))
        trainer.train()
    progress = Progress(step=trainer.state.global_step, seconds=time.monotonic() - started, core_seconds=time.process_time() - cpu)
    students.check_moved(student, before)
    students.save(student, out)
    _note(out / "curve.csv", trainer.state.log_history)
    written = manifest.identity(data, None, base_dir, config, teacher) | {
        **manifest.origin(out, base_dir, config),
        "parent_adapter": adapters.digest(adapter),
        "template_hash": prompts.template_hash(student.tokenizer),
        "precision": asdict(precision),
        "learnable": None,
        "reason": f"corrected on its own answers for {progress.step} steps",
        "metrics": {"steps": progress.step, "seconds": round(progress.seconds, 1), "core_seconds": round(progress.core_seconds, 1)},
        "max_answer_tokens": config.most_tokens,
    }
    (out / manifest.FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    return written


def _student(base_dir: Path, adapter: Path, precision: base.Precision) -> Student:
    """The adapter on the base it is served with, its weights in float32 to be trained. Raises AdapterRejected."""
    from peft import PeftModel

    adapters.verify(adapter, digest=adapters.digest(adapter), base_fingerprint=base.fingerprint(base_dir))
    model, tokenizer = base.load(base_dir, quantization=base.SERVING, precision=precision)
    tokenizer.padding_side = "left"
    return Student(PeftModel.from_pretrained(model, str(adapter), is_trainable=True), tokenizer, precision)


def _teacher(folder: Path, adapter: Path | None, precision: base.Precision) -> Student:
    """A model that is only asked; an adapter is merged into it."""
    from peft import PeftModel

    model, tokenizer = base.load(folder, quantization=base.SERVING if adapter else "none", precision=precision)
    if adapter:
        adapters.verify(adapter, digest=adapters.digest(adapter), base_fingerprint=base.fingerprint(folder))
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return Student(model.requires_grad_(False), tokenizer, precision)


def _trainer(
    student: Student, teacher: Student, rows: Sequence[examples.Example], config: OnPolicySettings, folder: Path
) -> DistillationTrainer:
    """TRL's, asking with the one rendering that serving uses."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    told = DistillationConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.step_examples,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_share,
        max_grad_norm=config.clip_norm,
        beta=config.divergence,
        temperature=config.temperature,
        max_completion_length=config.most_tokens,
        chat_template_kwargs={"sanitize_control_tokens": True},
        gradient_checkpointing=False,
        bf16=student.precision.dtype == "bfloat16",
        use_cpu=not base.has_gpu(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=config.seed,
    )
    asked = Dataset.from_list([{"prompt": prompts.conversation(row.prompt)} for row in rows])
    return DistillationTrainer(
        model=student.model, teacher_model=teacher.model, args=told, train_dataset=asked, processing_class=student.tokenizer
    )


def _note(file: Path, history: Sequence[dict[str, float]]) -> None:
    """What the trainer logged of each step, as the curve of a training."""
    curves.rewind(file, 0)
    for row in history:
        if "loss" in row:
            curves.note(file, Progress(step=int(row["step"])), row["loss"], row["learning_rate"], None)


if __name__ == "__main__":
    main()
