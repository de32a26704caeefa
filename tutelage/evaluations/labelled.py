"""How well domains are recognised with labels and found without: `tutelage domain-eval` on rows {"prompt", "domain", "intent"?}.

What is learned comes from the fit rows alone; data and out-of-domain rows are only judged. Refuses to know how either is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import InvalidRequest
from tutelage.evaluations import rows
from tutelage.evaluations.replay import Embedder, Progress, embed
from tutelage.routing import domains, recognition
from tutelage.scoring import wilson

if TYPE_CHECKING:
    import numpy as np

# Natural requests of a hundred kinds, each too rare to be a domain of its own: rare groups join the one they resemble most, and no row
# is called novel, for which `oos_auroc` has a figure of its own.
BROAD = domains.DiscoverySettings(
    min_share=0.015, min_similarity=0.2, directions=50, join_similarity=0.0, part_size=12, max_parts=64, novel_margin=2.0
)


@dataclass(frozen=True)
class Labelled:
    """Requests with the domain, and where known the kind (intent), that people gave them."""

    prompts: list[str]
    domains: list[str]
    kinds: list[str] | None


def read_labelled(path: Path) -> Labelled:
    """Rows {"prompt" or "text", "domain" or "label", "intent"?}. Raises InvalidRequest on a bad row, with its place, or an empty file."""
    found = list(rows.read_objects(path))
    if not found:
        raise InvalidRequest(f'{path}: no rows; rows are {{"prompt", "domain", "intent"?}}')
    prompts = [rows.text(place, row, "text" if "prompt" not in row and "text" in row else "prompt") for place, row in found]
    labels = [rows.text(place, row, "label" if "domain" not in row and "label" in row else "domain") for place, row in found]
    intents = [rows.label(place, row, "intent") for place, row in found]
    kinds = [intent for intent in intents if intent is not None]
    return Labelled(prompts, labels, kinds if len(kinds) == len(found) else None)


def evaluate(fit: Labelled, data: Labelled, oos: Labelled | None, encoder: Embedder, *, seed: int, progress: Progress) -> dict[str, Any]:
    """The report. Data rows of a domain that the fit rows lack count as wrong. Raises InvalidRequest on too few fit rows."""
    import numpy as np

    learned = embed(fit.prompts, encoder, progress, "encoding what to learn from")
    asked = embed(data.prompts, encoder, progress, "encoding what to judge")
    if len(fit.prompts) < recognition.MIN_ROWS:
        raise InvalidRequest(f"{len(fit.prompts)} labelled rows are too few to learn from; give at least {recognition.MIN_ROWS} with --fit")
    recogniser = recognition.fit(learned, fit.domains, kinds=fit.kinds, seed=seed)
    probabilities, scores = recogniser.judge(asked)
    right = np.array([recogniser.domains[i] for i in probabilities.argmax(axis=1)]) == np.array(data.domains)
    accuracy = wilson(int(right.sum()), len(right))
    majority = max(fit.domains.count(domain) for domain in set(fit.domains)) / len(fit.domains)
    report: dict[str, Any] = {
        "accuracy": accuracy.rate,
        "oos_auroc": None,
        "oos_recall_at_5pct": None,
        "nmi_unlabelled": None,
        "n": len(right),
        "n_fit": len(fit.prompts),
        "wilson95": [accuracy.lo, accuracy.hi],
        "majority": majority,
        "in_scope_rejected": float((scores < recogniser.threshold).mean()),
    }
    if oos is not None:
        report |= _out_of_scope(scores, recogniser, embed(oos.prompts, encoder, progress, "encoding what belongs nowhere"))
    return report | _unlabelled(learned, fit.prompts, asked, data.domains, seed)


def _out_of_scope(known: np.ndarray, recogniser: recognition.Recogniser, foreign: np.ndarray) -> dict[str, Any]:
    """Recall at the score that rejects 5 % of the data rows, and at the threshold learned from the fit rows alone."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    scores = recogniser.judge(foreign)[1]
    truth = np.concatenate([np.ones(len(known)), np.zeros(len(scores))])
    return {
        "oos_auroc": float(roc_auc_score(truth, np.concatenate([known, scores]))),
        "oos_recall_at_5pct": float((scores < np.quantile(known, 0.05)).mean()),
        "oos_recall_at_learned_threshold": float((scores < recogniser.threshold).mean()),
        "n_oos": len(scores),
    }


def _unlabelled(learned: np.ndarray, prompts: Sequence[str], asked: np.ndarray, truth: Sequence[str], seed: int) -> dict[str, Any]:
    """Domains found in the fit rows without their labels, against the data rows' labels."""
    from sklearn.metrics import normalized_mutual_info_score

    found = domains.discover(learned, prompts, labels=[None] * len(prompts), seed=seed, settings=BROAD)
    placed = [assignment.domain or "" for assignment in domains.DomainIndex(found).assign_all(asked)]
    return {
        "nmi_unlabelled": float(normalized_mutual_info_score(truth, placed)),
        "found_domains": [{"name": domain.name, "size": domain.size} for domain in found],
    }
