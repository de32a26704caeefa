"""Our training loop and TRL's SFTTrainer on the same model, tokens and settings, in one run: `python -m benchmarks.training --help`.

Each trains in a process of its own, in turns, on the same examples in the same order, and both results are measured by the same code
on the same held-out rows. Tokens are the data's own, without padding. Without `--data` the rows are a program's own and can be learnt
to nothing, where a ratio of losses says little: real labels are where losses compare. TRL comes with `make install`; elsewhere with the
extra `tutelage[on-policy]`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import headlines
from inference import base
from training import encoding, examples, finetune, memory, schedule, settings, students
from training.measure import measure
from training.packing import Sample
from training.recipe import FinetuneSettings
from tutelage.settings import CHECKOUT, Home

SYSTEMS = ("tutelage", "trl")
FLOPS_PER_PARAMETER = 4  # of a frozen weight for each token: two forward, two for the gradient of its input
HELD_OUT = 400
RECIPE = FinetuneSettings(
    method="lora",
    learning_rate=6e-4,
    step_examples=16,
    step_tokens=1,
    budget_tokens=None,
    max_epochs=1,
    pass_tokens=1024,
    checkpoint_steps=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--data", type=Path, help="JSONL of {prompt, label} to train on and to hold out of (default: made headlines)")
    parser.add_argument("--rows", type=int, default=320, help="training rows; 16 a step")
    parser.add_argument("--rounds", type=int, default=1, help="how often each system trains, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for both")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings.without_bars()
    base_dir = arguments.base or base.materialise(Home.from_environment().models)
    if arguments.system:
        print(json.dumps(one(arguments.system, arguments.folder, base_dir, arguments.threads)))
        return
    figures = compare(base_dir, arguments.data, rows=arguments.rows, rounds=arguments.rounds, threads=arguments.threads)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)


def compare(base_dir: Path, data: Path | None, *, rows: int, rounds: int, threads: int) -> dict[str, Any]:
    """Both systems in turns; medians of rounds, and what they say of each other."""
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        for name, part in zip(("train", "held"), parts(data, rows), strict=True):
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        task = bar.add_task("training", total=rounds * len(SYSTEMS))
        for number in range(rounds):
            for system in SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]:
                results[system].append(_in_a_process(system, Path(folder), base_dir, threads))
                bar.advance(task)
    medians = {
        system: {key: statistics.median(r[key] for r in of) for key in of[0] if isinstance(of[0][key], int | float)}
        for system, of in results.items()
    }
    ours, theirs = medians["tutelage"], medians["trl"]
    return {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "threads": threads},
        "precision": results["tutelage"][0]["precision"],
        "data": data.name if data else "made headlines",
        "rows": rows,
        "rounds": results,
        "medians": medians,
        "speedup": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "speedup_by_cpu_time": ours["tokens_per_core_second"] / theirs["tokens_per_core_second"],
        "loss_difference": ours["final_loss"] / theirs["final_loss"] - 1,
    }


def parts(data: Path | None, rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is trained on, `rows` of it, and what is held out."""
    if data is None:
        return list(headlines.rows(rows, seed=0)), list(headlines.rows(HELD_OUT, seed=1))
    given = [json.loads(line) for line in data.read_text().splitlines()]
    random.Random(0).shuffle(given)
    if len(given) < rows + HELD_OUT:
        raise SystemExit(f"{data} has {len(given)} rows; {rows} to train on and {HELD_OUT} to hold out are needed: lower --rows")
    return given[:rows], given[rows : rows + HELD_OUT]


def one(system: str, folder: Path, base_dir: Path, threads: int) -> dict[str, Any]:
    """Train with one system in this process and measure what came out."""
    import torch

    torch.set_num_threads(threads)
    precision = base.detect_precision()
    tokenizer = base.load_tokenizer(base_dir)
    samples = encoding.encode(examples.read(folder / "train.jsonl"), tokenizer, RECIPE)
    peak = matmul_peak(precision.dtype)
    trained = (_tutelage if system == "tutelage" else _trl)(folder, samples, base_dir, precision)
    tokens = sum(len(sample) for sample in samples[: len(samples) // RECIPE.step_examples * RECIPE.step_examples])
    student = students.with_saved_adapter(students.load(base_dir, RECIPE, precision), folder / system)
    held = encoding.encode(examples.read(folder / "held.jsonl"), tokenizer, RECIPE)
    seen = measure(student, held, pass_tokens=RECIPE.pass_tokens)
    per_token = FLOPS_PER_PARAMETER * memory.shape_of(base_dir, rank=RECIPE.rank).parameters
    return {
        "precision": precision.dtype,
        "seconds": trained["seconds"],
        "core_seconds": trained["core_seconds"],
        "tokens_per_second": tokens / trained["seconds"],
        "tokens_per_core_second": tokens / trained["core_seconds"],
        "share_of_peak": tokens / trained["seconds" if torch.cuda.is_available() else "core_seconds"] * per_token / peak,
        "peak_gflops": peak / 1e9,
        "memory_gib": trained["memory"] / 2**30,
        "final_loss": seen.loss,
        "held_out_accuracy": seen.accuracy,
    }


def matmul_peak(dtype: str, *, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOPs of square matrix products of this size for each second of a GPU or of a core: what it can do at best, measured now."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    clock = time.perf_counter if device == "cuda" else time.process_time  # of a core, so that other work on it does not count
    products, started = 0, clock()
    while clock() < started + seconds:
        left @ right
        products += 1
        wait()
    return 2 * size**3 * products / (clock() - started)


def _tutelage(folder: Path, samples: list[Sample], base_dir: Path, precision: base.Precision) -> dict[str, float]:
    manifest = finetune.finetune(
        folder / "train.jsonl",
        folder / "tutelage",
        validation=None,
        base_dir=base_dir,
        config=RECIPE,
        curve=folder / "curve.csv",
        say=lambda line: print(line, file=sys.stderr),
    )
    return {name: manifest["metrics"][name] for name in ("seconds", "core_seconds")} | {"memory": _memory()}


def _trl(folder: Path, samples: list[Sample], base_dir: Path, precision: base.Precision) -> dict[str, float]:
    """The same tokens in our order, ready made; padding and logits are TRL's own. It recomputes no activations, for ours do not either."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    ordered = [sample for step in schedule.plan(samples, RECIPE) for sample in step]
    rows = Dataset.from_dict(
        {
            "input_ids": [[*sample.prompt, *sample.completion] for sample in ordered],
            "completion_mask": [[0] * len(sample.prompt) + [1] * len(sample.completion) for sample in ordered],
        }
    )
    config = SFTConfig(
        output_dir=str(folder / "trl-run"),
        per_device_train_batch_size=RECIPE.step_examples,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=RECIPE.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=RECIPE.warmup_share,
        max_grad_norm=RECIPE.clip_norm,
        completion_only_loss=True,  # else rows that come as tokens are trained on their prompts too
        gradient_checkpointing=False,
        bf16=precision.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=RECIPE.seed,
    )
    lora = LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(str(base_dir), dtype=getattr(torch, precision.dtype), local_files_only=True)
    tokenizer = base.load_tokenizer(base_dir)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    cpu = time.process_time()
    seconds = trainer.train().metrics["train_runtime"]
    spent = {"seconds": seconds, "core_seconds": time.process_time() - cpu, "memory": _memory()}
    trainer.model.save_pretrained(str(folder / "trl"))
    return spent


def _memory() -> float:
    """The most bytes this process has held: of the GPU where there is one."""
    import torch

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return float(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else used)


def _in_a_process(system: str, data: Path, base_dir: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training", "--system", system, "--folder", str(data)]
    done = subprocess.run([*command, "--base", str(base_dir), "--threads", str(threads)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{system} did not train; see above. TRL is an extra: pip install 'tutelage[on-policy]'")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(figures: dict[str, Any]) -> None:
    """The comparison as a table, worst news included."""
    table = Table(
        "measure", *SYSTEMS, title=f"LoRA r{RECIPE.rank}, batch 16, {figures['precision']}, {figures['rows']} rows of {figures['data']}"
    )
    for key in figures["medians"]["tutelage"]:
        table.add_row(key.replace("_", " "), *(f"{figures['medians'][system][key]:.3g}" for system in SYSTEMS))
    console = Console()
    console.print(table)
    console.print(f"tokens/s of tutelage over TRL: {figures['speedup']:.2f} (by CPU time {figures['speedup_by_cpu_time']:.2f})")
    console.print(f"held-out loss of tutelage over TRL: {figures['loss_difference']:+.1%}")


if __name__ == "__main__":
    main()
