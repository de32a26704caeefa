from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_domains import bundle

from tutelage.errors import InvalidRequest
from tutelage.evaluations import labelled
from tutelage.evaluations.labelled import Labelled, evaluate
from tutelage.routing.recognition import Recogniser, complete, fit

SPREAD = 0.08


def labelled_traffic(each: int, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Four kinds of request, two to a domain."""
    embeddings = np.concatenate([bundle(axis, each, seed=seed, spread=SPREAD) for axis in range(4)])
    kinds = [f"kind-{axis}" for axis in range(4) for _ in range(each)]
    return embeddings, ["home" if kind in ("kind-0", "kind-1") else "travel" for kind in kinds], kinds


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    embeddings, domains, kinds = labelled_traffic(100)
    return fit(embeddings, domains, kinds=kinds, seed=0)


def test_a_request_is_recognised_whichever_kind_of_its_domain_it_is(recogniser: Recogniser) -> None:
    found = [recogniser.recognise(bundle(axis, 1, seed=9, spread=SPREAD)[0]) for axis in range(4)]
    assert [recognition.domain for recognition in found] == ["home", "home", "travel", "travel"]
    assert all(recognition.probability > 0.9 for recognition in found)


def test_what_resembles_nothing_is_novel_and_says_what_is_nearest(recogniser: Recogniser) -> None:
    strange = recogniser.recognise(bundle(9, 1, spread=SPREAD)[0])
    assert strange.novel
    assert strange.reason.startswith("novel: ")


def test_about_the_stated_share_of_unseen_known_traffic_is_called_novel(recogniser: Recogniser) -> None:
    _, scores = recogniser.judge(labelled_traffic(250, seed=4)[0])
    assert (scores < recogniser.threshold).mean() == pytest.approx(0.05, abs=0.04)


def test_kinds_are_found_where_nobody_named_them() -> None:
    embeddings, domains, _ = labelled_traffic(120)
    unnamed = fit(embeddings, domains, seed=0)
    asked, truth, _ = labelled_traffic(50, seed=4)
    probabilities, _ = unnamed.judge(asked)
    assert np.mean([unnamed.domains[i] for i in probabilities.argmax(axis=1)] == np.array(truth)) > 0.95


def test_requests_without_a_label_get_the_one_that_is_recognised_and_strange_ones_none() -> None:
    embeddings, named, _ = labelled_traffic(100)
    asked, truth, _ = labelled_traffic(20, seed=4)
    rows = np.concatenate([embeddings, asked, bundle(9, 20, spread=SPREAD)])
    labels = [*named, *[None] * (len(asked) + 20)]
    found = complete(rows, labels, least=30, seed=0)
    assert found[: len(named)] == named
    told = found[len(named) : len(named) + len(asked)]
    assert {pair for pair in zip(told, truth, strict=True) if pair[0] is not None} == {("home", "home"), ("travel", "travel")}
    assert told.count(None) < len(asked) * 0.15
    assert found[-20:] == [None] * 20


@pytest.mark.parametrize("labels", [["home"] * 150, ["home"] * 60 + ["travel"] * 20, ["home"] * 100 + ["slip"] * 5])
def test_labels_that_teach_too_little_complete_nothing(labels: list[str]) -> None:
    rows = np.concatenate([bundle(0, len(labels)), bundle(0, 10, seed=2)])
    assert complete(rows, [*labels, *[None] * 10], least=30, seed=0)[-10:] == [None] * 10


def test_a_stored_recogniser_says_the_same(recogniser: Recogniser, tmp_path: Path) -> None:
    recogniser.save(tmp_path / "domains.safetensors")
    again = Recogniser.load(tmp_path / "domains.safetensors")
    row = bundle(1, 1, seed=3)[0]
    assert again.recognise(row) == recogniser.recognise(row)
    (tmp_path / "broken").write_bytes(b"x")
    with pytest.raises(InvalidRequest, match="fit it again"):
        Recogniser.load(tmp_path / "broken")


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 100"):
        fit(bundle(0, 10), ["home"] * 10, seed=0)


class Axes:
    """Prompts name their own direction: "2 7" is the seventh request around axis 2."""

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([bundle(int(axis), 1, seed=int(number) + 1, spread=SPREAD) for axis, number in map(str.split, texts)])


def requests(axes: range, each: int, first: int = 0) -> Labelled:
    prompts = [f"{axis} {first + i}" for axis in axes for i in range(each)]
    return Labelled(prompts, ["home" if prompt[0] in "01" else "travel" for prompt in prompts], None)


def test_the_report_has_the_four_figures_and_learns_from_the_fit_rows_alone() -> None:
    fit_rows, data, oos = requests(range(4), 60), requests(range(4), 30, first=100), requests(range(8, 9), 40)
    report = evaluate(fit_rows, data, oos, Axes(), seed=0, progress=lambda *_: None)
    assert report["accuracy"] > 0.95 > report["majority"]
    assert report["oos_auroc"] > 0.95
    assert report["oos_recall_at_5pct"] > 0.9
    assert report["nmi_unlabelled"] > 0.6


def test_without_foreign_rows_their_figures_are_null() -> None:
    report = evaluate(requests(range(4), 60), requests(range(4), 20, first=100), None, Axes(), seed=0, progress=lambda *_: None)
    assert (report["oos_auroc"], report["oos_recall_at_5pct"]) == (None, None)


def test_rows_are_read_in_both_forms_and_bad_ones_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "home"}\n{"prompt": "b", "domain": "travel", "intent": "fly"}\n')
    assert labelled.read_labelled(path) == Labelled(["a", "b"], ["home", "travel"], None)
    path.write_text('{"prompt": "a", "domain": "home"}\n{"prompt": "b"}\n')
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl:2: `domain` is null"):
        labelled.read_labelled(path)
