"""What measures training on an accelerator is run here on a tiny base, so that it works where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import build_tiny_base

from benchmarks import gpu, headlines, reasoning
from inference import base
from training import memory
from tutelage.scoring import final


@pytest.mark.parametrize("workload", gpu.WORKLOADS)
def test_every_workload_of_the_accelerator_benchmark_gives_its_figures(tmp_path: Path, workload: str) -> None:
    figures = gpu.one(build_tiny_base(tmp_path / "tiny"), workload, tmp_path, steps=4, pass_tokens=512)
    assert figures["workload"] == workload
    assert figures["tokens_per_second"] > 0
    assert 0 < figures["share_of_peak"] < 1


def test_the_random_base_has_the_small_ones_tokenizer_and_the_size_asked_for(tmp_path: Path) -> None:
    small = build_tiny_base(tmp_path / "tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = gpu.random_billion(small, tmp_path / "random", **sizes)
    assert base.load_tokenizer(made).get_vocab() == base.load_tokenizer(small).get_vocab()
    assert memory.shape_of(made, rank=4).layers == 3


def test_reasons_end_with_the_answer() -> None:
    for row in reasoning.chain_sums(50, terms=4, seed=1):
        reasoned = reasoning.with_reasons(row)
        assert final(reasoned.answer) == row.label
        assert reasoned.answer.count("\n") == 2
        assert final(row.answer) == row.label


def test_headlines_are_the_same_for_the_same_seed_and_have_every_label() -> None:
    rows = headlines.rows(200, seed=3)
    assert rows == headlines.rows(200, seed=3) != headlines.rows(200, seed=4)
    assert {row["label"] for row in rows} == {"up", "down", "neutral", "none"}
