"""Training speed on the accelerator at hand: QLoRA, LoRA and distillation, a small and a 1B-class base. `python -m benchmarks.gpu --help`.

The 1B-class base is random: its speed is that of a trained one, its losses say nothing. Runs on a CPU too, which is how it is tested; it
refuses to compare machines.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import headlines
from benchmarks.training import FLOPS_PER_PARAMETER, matmul_peak
from inference import base
from training import finetune, memory, settings
from training.recipe import FinetuneSettings
from tutelage.settings import Home
from tutelage.stores.datasets import read_curve

WORKLOADS = ("qlora", "lora", "distilled")
LINES = 12  # headlines in a prompt, about 300 tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--base", type=Path, help="small base (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each workload")
    parser.add_argument("--pass-tokens", type=int, default=8192)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--small-only", action="store_true", help="leave the 1B-class base out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    arguments = parser.parse_args()
    settings.without_bars()
    small = arguments.base or base.materialise(Home.from_environment().models)
    with tempfile.TemporaryDirectory() as folder:
        bases = [small] if arguments.small_only else [small, random_billion(small, Path(folder) / "random-1b")]
        figures = [
            one(folder_of, workload, Path(folder), steps=arguments.steps, pass_tokens=arguments.pass_tokens)
            for folder_of in bases
            for workload in arguments.workloads
        ]
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)


def random_billion(small: Path, out: Path, **smaller: int) -> Path:
    """A random Llama of 1.1 billion weights with the small base's tokenizer; `smaller` overrides its sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = base.load_tokenizer(small)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **(sizes | smaller), **special)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return out


def one(base_dir: Path, workload: str, folder: Path, *, steps: int, pass_tokens: int) -> dict[str, Any]:
    """Train `steps` steps of one workload and say how fast, in how much memory, at what share of the machine's matrix products."""
    import torch

    config = FinetuneSettings(
        method="lora" if workload == "lora" else "qlora",
        strategy="soft-targets" if workload == "distilled" else "response",
        step_examples=32,
        step_tokens=1,
        budget_tokens=None,
        max_epochs=1,
        pass_tokens=pass_tokens,
        checkpoint_steps=0,
    )
    data, out = folder / "train.jsonl", folder / f"{base_dir.name}-{workload}"
    data.write_text("".join(json.dumps(row) + "\n" for row in long_rows(steps * config.step_examples)))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    peak = matmul_peak(base.detect_precision().dtype, size=8192 if torch.cuda.is_available() else 1024)
    teacher = (base_dir, None) if workload == "distilled" else None
    manifest = finetune.finetune(
        data, out, validation=None, base_dir=base_dir, config=config, curve=folder / "curve.csv", teacher=teacher, say=lambda line: None
    )
    parameters = memory.shape_of(base_dir, rank=config.rank).parameters
    speed = steady(read_curve(folder / "curve.csv"))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "precision": manifest["precision"]["dtype"],
        "base": base_dir.name,
        "parameters": parameters,
        "workload": workload,
        "tokens_per_second": speed,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "peak_tflops": peak / 1e12,
        "share_of_peak": speed * FLOPS_PER_PARAMETER * parameters / peak / (1 if torch.cuda.is_available() else torch.get_num_threads()),
    }


def steady(curve: Sequence[dict[str, float]]) -> float:
    """Tokens a second after the first quarter of the steps, in which kernels are chosen and memory is found."""
    first, last = curve[len(curve) // 4], curve[-1]
    return (last["tokens"] - first["tokens"]) / max(last["seconds"] - first["seconds"], 0.01)


def long_rows(count: int) -> list[dict[str, str]]:
    """Prompts of several headlines; the label is that of the last."""
    lines = headlines.rows(count * LINES, seed=0)
    groups = [lines[start : start + LINES] for start in range(0, len(lines), LINES)]
    return [{"prompt": "\n".join(line["prompt"] for line in group), "label": group[-1]["label"]} for group in groups]


def show(figures: Sequence[dict[str, Any]]) -> None:
    table = Table("base", "workload", "tokens/s", "GiB", "of peak", title=f"{figures[0]['device']}, {figures[0]['precision']}")
    for row in figures:
        held = f"{row['memory_gib']:.1f}" if row["memory_gib"] else "–"
        table.add_row(row["base"], row["workload"], f"{row['tokens_per_second']:,.0f}", held, f"{row['share_of_peak']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
