"""`tutelage cache-eval`: the semantic cache's verifier on labelled data, beside what a bare cosine does with the same rows.

Rows are pairs `{"text_a", "text_b", "label"}`, or `{"origin", "similar"}`: every origin is stored, every similar asked, and a hit is right
if the stored text is the row's origin. It refuses to know the gateway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tutelage.errors import InvalidRequest
from tutelage.routing import pairs
from tutelage.routing.budget import LEVELS
from tutelage.routing.encoder import MANIFEST, Encoder
from tutelage.routing.equivalence import GUARDS, Question, compare
from tutelage.scoring import wilson
from tutelage.settings import CHECKOUT, Home

if TYPE_CHECKING:
    import numpy as np

PRECISION = 0.9
COSINE = 0.8  # where a cosine cache is usually run
CANDIDATES = 4
BATCH = 64
FIELDS = (("text_a", "text_b", "label"), ("origin", "similar"))
ENOUGH_CORRECT = 804 / 999  # of all asked: what GPTCache's own run of its mock data reached


class Rows(NamedTuple):
    """Two texts a row and, for pairs, whether they are the same (None for origin and similar)."""

    first: list[str]
    second: list[str]
    same: list[bool] | None


class Measured(NamedTuple):
    """Pairs as the verifier sees them: traits [n, t], cosine [n], and whether no guard speaks against them [n]."""

    traits: np.ndarray
    cosine: np.ndarray
    free: np.ndarray
    guards: list[str]


def run(home: Home, *, data: Path, fit: Path | None, report: Path, halves: int, seed: int) -> dict[str, Any]:
    """Write `report` and, beside it, its plot as SVG; what was written. Raises InvalidRequest for files that cannot be used."""
    from rich.console import Console
    from rich.progress import Progress

    rows, learned = read(data), None if fit is None else read(fit)
    if learned is not None and learned.same is None:
        raise InvalidRequest(f"--fit {fit}: pairs with text_a, text_b and label are expected, for nothing is labelled here")
    if halves and rows.same is None:
        raise InvalidRequest("--halves: only pairs can be parted into halves; leave it out for origin and similar")
    encoder = _encoder(home)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        known = None if learned is None else _measure(learned.first, learned.second, encoder, bars, "fit")
        classifier: pairs.Classifier = pairs.Unfitted()
        if known is not None and learned is not None:
            import numpy as np

            classifier = pairs.fit(known.traits, np.array(learned.same), seed=seed)
        if rows.same is None:
            told, plot = _stored(rows, classifier, encoder, bars)
        else:
            told, plot = _paired(rows, classifier, encoder, bars, halves=halves, seed=seed)
    told = {
        "data": str(data),
        "fit": None if fit is None else str(fit),
        "fitted": isinstance(classifier, pairs.Fitted),
        "n": len(rows.first),
    } | told
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(told, indent=2) + "\n")
    _draw(plot, report.with_suffix(".svg"))
    return told


def read(path: Path) -> Rows:
    """Raises InvalidRequest with the line that cannot be used."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as broken:
        raise InvalidRequest(f"{path} cannot be read: {broken}") from broken
    found = [(number, _row(path, number, line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InvalidRequest(f"{path} has no rows; JSON lines with {_expected()} are expected")
    fields = next((names for names in FIELDS if names[0] in found[0][1]), FIELDS[0])
    for number, row in found:
        for name in fields[:2]:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InvalidRequest(f"{path}, line {number}: {name!r} must be a text; each row has {_expected()}")
        if fields == FIELDS[0] and row.get("label") not in (0, 1):
            raise InvalidRequest(f"{path}, line {number}: 'label' is {row.get('label')!r}; 1 (the same question) or 0 is expected")
    same = [bool(row["label"]) for _, row in found] if fields == FIELDS[0] else None
    return Rows([row[fields[0]] for _, row in found], [row[fields[1]] for _, row in found], same)


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as broken:
        raise InvalidRequest(f"{path}, line {number}: not JSON: {broken}") from broken
    if not isinstance(row, dict):
        raise InvalidRequest(f"{path}, line {number}: an object with {_expected()} is expected")
    return row


def _expected() -> str:
    return " or ".join(", ".join(names) for names in FIELDS)


def _encoder(home: Home) -> Encoder:
    folder = home.models / "encoder"
    if not (folder / MANIFEST).exists():
        subprocess.run(
            [sys.executable, "-m", "inference.encoder_export", "--out", str(folder)], check=True, cwd=CHECKOUT, stdout=subprocess.DEVNULL
        )
    return Encoder(folder, threads=os.cpu_count() or 1, cache_size=100_000)


def _measure(first: Sequence[str], second: Sequence[str], encoder: Encoder, bars: Any, told: str) -> Measured:
    import numpy as np

    task = bars.add_task(told, total=len(first))
    traits, cosines, guards = [], [], []
    for start in range(0, len(first), BATCH):
        a, b = first[start : start + BATCH], second[start : start + BATCH]
        vectors = encoder.encode([*a, *b])
        cosine = (vectors[: len(a)] * vectors[len(a) :]).sum(1)
        questions = [(Question(one), Question(other)) for one, other in zip(a, b, strict=True)]
        compared = [(one, other, float(c), compare(one, other)) for (one, other), c in zip(questions, cosine, strict=True)]
        traits.append(pairs.traits(compared, reader=encoder))
        cosines.append(cosine)
        guards += [found.difference.guard if found.difference else "" for _, _, _, found in compared]
        bars.advance(task, len(a))
    return Measured(np.concatenate(traits), np.concatenate(cosines), np.array([not guard for guard in guards]), guards)


# --- pairs -----------------------------------------------------------------------------------------------------------


def _paired(
    rows: Rows, classifier: pairs.Classifier, encoder: Encoder, bars: Any, *, halves: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np
    from sklearn.metrics import precision_recall_curve

    same = np.array(rows.same)
    if same.all() or not same.any():
        raise InvalidRequest("all pairs have the same label; both 1 and 0 are needed to tell them apart")
    found = _measure(rows.first, rows.second, encoder, bars, "compare")
    probability = classifier.probability(found.traits)
    told = {
        **_ranked(same, probability),
        **_served(same, found.free & (probability >= min(LEVELS))),
        "threshold": min(LEVELS),
        "operating_points": [
            {"threshold": level, **_served(same, found.free & (probability >= level))} for level in sorted((*LEVELS, 0.5, 0.7))
        ],
        "majority": float(max(same.mean(), 1 - same.mean())),
        "minilm_cosine": {**_ranked(same, found.cosine), "threshold": COSINE, **_served(same, found.cosine >= COSINE)},
        "guards": {guard: _guarded(same, np.array(found.guards) == guard) for guard in GUARDS if guard in found.guards},
    }
    if halves:
        told["halves"] = _halved(same, found, bars, halves=halves, seed=seed)
    curves = {name: precision_recall_curve(same, score)[:2] for name, score in (("verified", probability), ("MiniLM cosine", found.cosine))}
    return told, {"kind": "precision-recall", "curves": {name: (recall, precision) for name, (precision, recall) in curves.items()}}


def _halved(same: np.ndarray, found: Measured, bars: Any, *, halves: int, seed: int) -> dict[str, Any]:
    """Fit on a random half, measure the other: `halves` times."""
    import numpy as np

    task, each = bars.add_task("halves", total=halves), []
    for number in range(halves):
        order = np.random.default_rng(seed + number).permutation(len(same))
        fitting, judged = order[: len(same) // 2], order[len(same) // 2 :]
        probability = pairs.fit(found.traits[fitting], same[fitting], seed=seed).probability(found.traits[judged])
        served = found.free[judged] & (probability >= min(LEVELS))
        cosine = _ranked(same[judged], found.cosine[judged])
        each.append(
            {**_ranked(same[judged], probability), **_served(same[judged], served)}
            | {f"minilm_{name}": value for name, value in cosine.items()}
        )
        bars.advance(task)
    measures = ("ap", "recall_at_p90", "hit_rate", "false_hit_rate", "minilm_ap", "minilm_recall_at_p90")
    mean = {name: float(np.mean([half[name] for half in each])) for name in measures}
    return {"n": halves, "mean": mean, "std": {name: float(np.std([half[name] for half in each])) for name in measures}, "each": each}


def _ranked(same: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(same, score)
    return {"ap": float(average_precision_score(same, score)), "recall_at_p90": float(recall[precision >= PRECISION].max())}


def _served(same: np.ndarray, served: np.ndarray) -> dict[str, Any]:
    """`hit_rate` of all pairs; `false_hit_rate` of the hits."""
    hits, wrong = int(served.sum()), int((served & ~same).sum())
    false = wilson(wrong, hits)
    return {"hit_rate": hits / len(same), "false_hit_rate": false.rate, "false_hit_wilson95": [false.lo, false.hi], "hits": hits}


def _guarded(same: np.ndarray, refused: np.ndarray) -> dict[str, Any]:
    return {"refused": int(refused.sum()), "of_them_same": float(same[refused].mean())}


# --- origin and similar ----------------------------------------------------------------------------------------------


def _stored(rows: Rows, classifier: pairs.Classifier, encoder: Encoder, bars: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    import faiss
    import numpy as np

    stored = list(dict.fromkeys(rows.first))
    known, asked = encoder.encode(stored), encoder.encode(rows.second)
    index = faiss.IndexFlatIP(encoder.dimension)
    index.add(known)
    cosines, near = index.search(asked, min(CANDIDATES, len(stored)))
    found = _measure([text for text in rows.second for _ in near[0]], [stored[i] for i in near.ravel()], encoder, bars, "ask")
    alone = np.where(found.free, classifier.probability(found.traits), 0.0).reshape(near.shape)
    probability = np.array([pairs.exclusive(row.tolist(), places.tolist()) for row, places in zip(alone, near, strict=True)])
    right = np.array([[stored[i] == origin for i in places] for places, origin in zip(near, rows.first, strict=True)])
    best = probability.argmax(1)
    each = np.arange(len(best))
    ours = _points(probability[each, best], right[each, best])
    plain = _points(cosines[:, 0], right[:, 0])
    told: dict[str, Any] = {"stored": len(stored), "operating_points": ours, "minilm_cosine": {"operating_points": plain}}
    enough = round(ENOUGH_CORRECT * len(best))
    told["at_least_correct"] = {"correct": enough, "verified": _cheapest(ours, enough), "minilm_cosine": _cheapest(plain, enough)}
    curves = {
        name: ([point["wrong"] for point in points], [point["correct"] for point in points])
        for name, points in (("verified", ours), ("MiniLM cosine", plain))
    }
    return told, {"kind": "correct-wrong", "curves": curves}


def _points(score: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """One for each hundredth of the rows served, surest first."""
    import numpy as np

    order = np.argsort(-score, kind="stable")
    points = []
    for served in sorted({round(len(order) * share / 200) for share in range(1, 201)} - {0}):
        correct = int(right[order[:served]].sum())
        threshold = float(score[order[served - 1]])
        points.append({"threshold": threshold, "correct": correct, "wrong": served - correct, "miss": len(order) - served})
    return points


def _cheapest(points: Sequence[dict[str, Any]], enough: int) -> dict[str, Any] | None:
    return next((point for point in points if point["correct"] >= enough), None)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw(plot: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4))
    axes = figure.add_subplot()
    for name, (x, y) in plot["curves"].items():
        axes.plot(x, y, label=name)
    across, up = ("recall", "precision") if plot["kind"] == "precision-recall" else ("wrong", "correct")
    axes.set(xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def lines(told: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield f"{told['n']} rows, {'fitted on ' + told['fit'] if told['fitted'] else 'not fitted'}"
    if "ap" in told:
        plain = told["minilm_cosine"]
        yield f"average precision {told['ap']:.4f} (MiniLM cosine {plain['ap']:.4f})"
        yield f"recall at precision 0.90 {told['recall_at_p90']:.3f} (MiniLM cosine {plain['recall_at_p90']:.3f})"
        yield f"served from {told['threshold']}: {told['hit_rate']:.3f} hits, {told['false_hit_rate']:.3f} of them wrong"
        yield f"MiniLM cosine from {COSINE}: {plain['hit_rate']:.3f} hits, {plain['false_hit_rate']:.3f} of them wrong"
    if "halves" in told:
        mean, n = told["halves"]["mean"], told["halves"]["n"]
        yield f"fitted, mean of {n} halves: average precision {mean['ap']:.4f}, recall at precision 0.90 {mean['recall_at_p90']:.3f}"
    if "at_least_correct" in told:
        for name in ("verified", "minilm_cosine"):
            yield f"{name}: {told['at_least_correct'][name]}"
