from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import InvalidRequest
from tutelage.routing import features
from tutelage.routing.estimates import QualityModel, fit
from tutelage.settings import CHECKOUT

WORDS = ["river", "quantum", "sonnet", "ledger"]
DIMENSION = 16


def embed(prompts: list[str]) -> np.ndarray:
    """A stand-in for the encoder: which of the four words a prompt has, and a little noise that is the prompt's own."""
    rows = np.array([np.random.default_rng(len(p) * 31 + sum(map(ord, p))).normal(0, 0.2, DIMENSION) for p in prompts])
    for i, prompt in enumerate(prompts):
        rows[i, [WORDS.index(word) for word in WORDS if word in prompt]] += 1.0
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def asked(n: int, seed: int = 0) -> tuple[list[str], list[str | None], dict[str, list[float | None]]]:
    """Prompts about four things; the weak model knows two of them, the strong one all, both but for one in ten."""
    random = np.random.default_rng(seed)
    subjects = random.integers(0, 4, n)
    prompts = [f"question {random.integers(1000)} about a {WORDS[s]}" for s in subjects]
    slips = random.random((n, 2)) < 0.1
    weak = [float((s < 2) != slip) for s, slip in zip(subjects, slips[:, 0], strict=True)]
    strong = [float(not slip) for slip in slips[:, 1]]
    return prompts, [f"d{s}" for s in subjects], {"weak": list(weak), "strong": list(strong)}


@pytest.fixture(scope="module")
def model() -> QualityModel:
    prompts, domains, outcomes = asked(400)
    return fit(prompts, embed(prompts), domains, outcomes, seed=0).model


def probability(model: QualityModel, name: str, prompt: str, domain: str | None = None) -> float:
    return model.probability(name, embed([prompt])[0], prompt, domain).probability


def test_what_a_model_was_good_at_is_probable_and_what_it_was_not_is_not(model: QualityModel) -> None:
    assert probability(model, "weak", "a new question about a river", "d0") > 0.75
    assert probability(model, "weak", "a new question about a ledger", "d3") < 0.25
    assert probability(model, "strong", "a new question about a ledger", "d3") > 0.75


def test_the_domain_alone_shifts_an_estimate(model: QualityModel) -> None:
    vague = "what is this?"
    assert probability(model, "weak", vague, "d0") > probability(model, "weak", vague, "d3") + 0.05


def test_a_domain_never_seen_is_as_none(model: QualityModel) -> None:
    assert probability(model, "weak", "a river", "elsewhere") == probability(model, "weak", "a river")


def test_one_question_for_all_models_says_the_same_as_one_for_each(model: QualityModel) -> None:
    prompt = "tell me of a sonnet"
    together = model.probabilities(embed([prompt])[0], prompt, "d2")
    assert together == {name: model.probability(name, embed([prompt])[0], prompt, "d2") for name in ("weak", "strong")}


def test_a_model_without_enough_outcomes_is_unknown_and_says_how_many_it_has() -> None:
    prompts, domains, outcomes = asked(60)
    outcomes["new"] = [1.0] * 19 + [None] * 41
    fitted = fit(prompts, embed(prompts), domains, outcomes, seed=0).model
    found = fitted.probability("new", embed(["x"])[0], "x", None)
    assert (found.kind, found.probability, found.n) == ("unknown", 0.0, 19)
    assert "only 19 outcomes of new" in found.reason
    assert fitted.probability("weak", embed(["x"])[0], "x", None).kind == "platt"
    assert fitted.probability("never seen", embed(["x"])[0], "x", None).kind == "unknown"


def test_models_judged_on_different_requests_are_learned_apart() -> None:
    prompts, domains, outcomes = asked(300)
    outcomes["weak"] = [score if i % 2 else None for i, score in enumerate(outcomes["weak"])]
    fitted = fit(prompts, embed(prompts), domains, outcomes, seed=0)
    assert fitted.model.calibrators["weak"].n == 150
    assert fitted.model.calibrators["strong"].n == 300
    assert np.isnan(fitted.held_out[::2, 0]).all() and not np.isnan(fitted.held_out[1::2, 0]).any()
    assert probability(fitted.model, "weak", "a new question about a river", "d0") > 0.7


def test_held_out_estimates_do_not_know_their_own_outcome() -> None:
    """Outcomes that are pure chance cannot be told from the prompt: what is said of a row must not correlate with its own outcome."""
    prompts, domains, _ = asked(400)
    coin = [float(x) for x in np.random.default_rng(3).integers(0, 2, 400)]
    held_out = fit(prompts, embed(prompts), domains, {"coin": coin}, seed=0).held_out[:, 0]
    assert abs(np.corrcoef(held_out, coin)[0, 1]) < 0.2


def test_a_stored_model_says_the_same(model: QualityModel, tmp_path: Path) -> None:
    model.save(tmp_path / "estimates.safetensors")
    again = QualityModel.load(tmp_path / "estimates.safetensors")
    for prompt in ("a river", "Ünïcödé 漢字 1/2", "", "lone \ud800"):
        assert again.probabilities(embed([prompt])[0], prompt, "d1") == model.probabilities(embed([prompt])[0], prompt, "d1")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"not safetensors")
    with pytest.raises(InvalidRequest, match="holds no estimates"):
        QualityModel.load(tmp_path / "broken")


def test_the_same_outcomes_teach_the_same(model: QualityModel) -> None:
    prompts, domains, outcomes = asked(400)
    again = fit(prompts, embed(prompts), domains, outcomes, seed=0).model
    assert np.array_equal(again.scores(embed(["x"])[0], "x", None), model.scores(embed(["x"])[0], "x", None))


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must be as many"):
        fit(["a"], embed(["a", "b"]), [None], {"m": [1.0]}, seed=0)


def test_estimating_needs_no_scikit_learn(model: QualityModel, tmp_path: Path) -> None:
    model.save(tmp_path / "estimates")
    program = (
        "import sys, numpy; from pathlib import Path; from tutelage.routing.estimates import QualityModel;"
        f"m = QualityModel.load(Path({str(tmp_path / 'estimates')!r}));"
        f"m.probabilities(numpy.ones({DIMENSION}, 'float32'), 'hello', None);"
        "print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert found.stdout.strip() == "[]"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_has_as_many_features_all_finite(text: str) -> None:
    assert len(features.surface(text)) == len(features.surface("x"))
    assert np.isfinite(features.surface(text)).all()
    for buckets in (features.word_buckets(text), features.letter_buckets(text)):
        assert ((buckets >= 0) & (buckets < features.BUCKETS)).all()
        terms = features.weigh(buckets, features.rarity([buckets]))
        assert len(terms.buckets) == 0 or float(terms.weights @ terms.weights) == pytest.approx(1.0, abs=1e-4)


def test_letters_are_read_within_words_and_at_their_edges_alone() -> None:
    assert set(features.letter_buckets("ab cd")) == set(features.letter_buckets("ab")) | set(features.letter_buckets("cd"))
