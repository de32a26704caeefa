"""Evaluate: an adapter, or the bare base, on held-out items, through the same engine that will serve it.

One set of items calibrates confidence, another is judged; no figure of the report is tuned on the second. Greedy answers, so a report can
be reproduced. Beside the student's figures stand those it must beat: the majority answer, the answer of the nearest training example, the
untrained base, and the base shown such examples. This stage refuses to decide anything: the gate reads the report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from inference import adapters, base, prompts
from training import baselines, examples, settings
from training.examples import Example
from training.finetune import MANIFEST
from tutelage.errors import AdapterRejected, TrafficUnreadable
from tutelage.evolution.canaries import key_of
from tutelage.routing import confidence, signs
from tutelage.routing.signs import ALTERNATIVES, Signs
from tutelage.scoring import Rate, majority, wilson
from tutelage.settings import Home, JudgedBySettings, Strict
from tutelage.verifiers import Verifier, VerifierSettings, verifier
from tutelage.verifiers.judge import ModelJudge, judged

if TYPE_CHECKING:
    from inference.generation import Completion, Engine

STUDENT = "student"
RELIABILITY_BINS = 10


class EvaluateSettings(Strict):
    """`threshold`: the calibrated probability from which an answer counts as confident. `threads` 0 leaves the default.

    The untrained base answers the first `untrained_items` of the judged items too, for comparison with an adapter, and the first
    `in_context_items` of them with `in_context_examples` of the nearest training examples before the question.
    An answer may be `extra_tokens` longer than the longest one in training (or, for the bare base, among the labels).
    `core_hour_usd` prices the CPU time of an answer. `verifier`: when an answer is right; `judge`: which model says so
    where the verifier does not, for tasks without one right answer. `again`: draw more answers to each held-out item (`signs.AGAIN`), to
    learn what it tells that a student says the same when asked again; of short answers their probability tells as much.
    """

    batch: int = Field(default=16, ge=1)
    extra_tokens: int = Field(default=4, ge=0)
    threshold: float = Field(default=0.85, gt=0, le=1)
    untrained_items: int = Field(default=30, ge=0)
    in_context_items: int = Field(default=20, ge=0)
    in_context_examples: int = Field(default=3, ge=1)
    core_hour_usd: float = Field(default=0.04, ge=0)
    verifier: VerifierSettings = VerifierSettings()
    judge: JudgedBySettings | None = None
    again: bool = False
    threads: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Answered:
    """One item with the model's answer and what that tells of itself."""

    example: Example
    completion: Completion
    signs: Signs
    correct: bool
    win: bool  # at least as good as the teacher's recorded answer to the same item

    @property
    def whole(self) -> bool:
        """Whether the model ended the answer itself; one that was cut off is never given to a client."""
        return self.completion.finish_reason == "stop"

    @property
    def domain(self) -> str:
        return str(self.example.metadata.get("domain") or "all")

    def probability(self, calibrator: confidence.Calibrator) -> float:
        """Calibrated probability of being right; 0 for an answer that was cut off."""
        if not self.whole:
            return 0.0
        known = calibrator.again if calibrator.again and self.signs.agreement is not None else calibrator
        return known.probability(known.reading.score(self.signs))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--adapter", required=True, help="adapter folder, or `none` for the untrained base")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of held-out items")
    parser.add_argument("--report", type=Path, required=True, help="JSON report to write")
    parser.add_argument("--calibration", type=Path, help="JSONL of other held-out items: fits the calibrator")
    parser.add_argument("--train", type=Path, help="JSONL that was trained on: for the baselines that look answers up in it")
    parser.add_argument("--against", type=Path, help="predictions of another model on these items: for the change in each domain")
    parser.add_argument("--canaries", type=Path, help="JSONL of items that were never exported; a missing or empty file is none")
    parser.add_argument("--predictions", type=Path, help="JSONL of every answer to write")
    parser.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    parser.add_argument("--config", type=Path, help="YAML with EvaluateSettings")
    arguments = parser.parse_args()
    settings.without_bars()
    report = evaluate(
        None if arguments.adapter == "none" else Path(arguments.adapter),
        arguments.data,
        calibration=arguments.calibration,
        base_dir=arguments.base or base.materialise(Home.from_environment().models),
        config=settings.read(EvaluateSettings, arguments.config),
        predictions=arguments.predictions,
        train=arguments.train,
        against=arguments.against,
        canaries=arguments.canaries,
    )
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    _write_reliability(report["reliability"], arguments.report.with_name("reliability.csv"))
    arguments.report.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    low, high = report["wilson95"]
    print(f"evaluate: {report['correct']} of {report['n']} right, {low:.2f} to {high:.2f}, majority {report['majority']:.2f}")


def evaluate(
    adapter: Path | None,
    data: Path,
    *,
    base_dir: Path,
    config: EvaluateSettings,
    calibration: Path | None = None,
    predictions: Path | None = None,
    train: Path | None = None,
    against: Path | None = None,
    canaries: Path | None = None,
) -> dict[str, Any]:
    """Answer the items of `data` and return the report; writes `predictions` when asked.

    Raises:
        TrafficUnreadable: a row of `data` or `calibration` cannot be read.
        AdapterRejected: the adapter's files cannot be loaded onto this base.
        ConfigInvalid, EngineFailed: the judge's key is not set; it does not answer.
    """
    from inference.generation import Engine

    tested = examples.read(data)
    manifest = _manifest(adapter)
    # what its probe found hopeless will never answer anybody: its confidence is not worth the time
    hopeless = manifest.get("learnable") is False
    calibrating = examples.read(calibration) if calibration and not hopeless else []
    engine = Engine(base_dir, threads=config.threads)
    if adapter:
        engine.load_adapter(STUDENT, adapter, adapters.digest(adapter))
    max_tokens = (manifest.get("max_answer_tokens") or _longest(tested, base_dir)) + config.extra_tokens
    ask = partial(answer, engine, max_tokens=max_tokens, batch=config.batch, verify=_verifier(config))
    again = partial(asked_again, engine, max_tokens=max_tokens, batch=config.batch) if config.again and adapter and calibrating else list
    outcomes = again(ask(calibrating, student=STUDENT if adapter else None))
    calibrator = _fit(outcomes) if calibrating else None
    started = time.perf_counter()
    answered = ask(tested, student=STUDENT if adapter else None)
    seconds = time.perf_counter() - started
    answered = again(answered)
    if predictions:
        predictions.write_text("".join(json.dumps(_prediction(a, calibrator), ensure_ascii=False) + "\n" for a in answered))
    untrained = ask(tested[: config.untrained_items], student=None) if adapter else []
    learned = examples.read(train) if train else []
    kept_apart = examples.read(canaries) if canaries and canaries.exists() and canaries.stat().st_size and not hopeless else []
    return {
        "adapter_digest": answered[0].completion.adapter_digest,
        "canaries": _canaries(ask(kept_apart, student=STUDENT if adapter else None)),
        "untrained": {"n": len(untrained), "correct": sum(a.correct for a in untrained)},
        "learnable": manifest.get("learnable"),
        "learnable_reason": manifest.get("reason"),
        **_accuracy(answered),
        "baselines": _baselines(answered, learned, config, ask, _fits(base_dir, engine.context - max_tokens)),
        **_domains(answered, _reference(against) if against else {a.example.text: a.correct for a in untrained}),
        "later": _share([a for a in answered if a.example.metadata.get("later")]),
        **_calibration(answered, calibrator, config.threshold),
        # what was judged was measured by a calibrator that never saw it; what will serve may learn from all that is held out
        "calibrator": _fit([*outcomes, *answered]).to_dict() if calibrating else None,
        **_speed(answered, seconds),
        "per_success": _per_success(answered, config.core_hour_usd),
        "max_tokens": max_tokens,
    }


def answer(
    engine: Engine, items: Sequence[Example], *, student: str | None, max_tokens: int, batch: int, verify: Verifier
) -> list[Answered]:
    """Greedy answers in the order of `items`; prompts of similar length share a batch so that padding costs little."""
    from inference.generation import Request

    order = sorted(range(len(items)), key=lambda i: len(items[i].text))
    done: dict[int, Answered] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        requests = [
            Request(messages=list(items[i].prompt), adapter=student, max_tokens=max_tokens, top_logprobs=ALTERNATIVES) for i in chosen
        ]
        for i, completion in zip(chosen, engine.generate(requests), strict=True):
            item = items[i]
            right = verify(completion.text, item.label, item.facts).right
            win = right or not verify(item.answer, item.label, item.facts).right
            done[i] = Answered(item, completion, _signs(completion), right, win)
    return [done[i] for i in range(len(items))]


def asked_again(engine: Engine, answered: Sequence[Answered], *, max_tokens: int, batch: int) -> list[Answered]:
    """The student's answers, each with the agreement of further ones drawn to the same item; what was cut off is not asked again."""
    from inference.generation import Request

    order = sorted((i for i in range(len(answered)) if answered[i].whole), key=lambda i: len(answered[i].example.text))
    drawn: dict[int, list[str]] = {i: [] for i in order}
    for seed in range(signs.AGAIN):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            requests = [
                Request(list(answered[i].example.prompt), STUDENT, max_tokens, signs.AGAIN_TEMPERATURE, seed=signs.AGAIN * i + seed)
                for i in chosen
            ]
            for i, completion in zip(chosen, engine.generate(requests), strict=True):
                drawn[i].append(completion.text)
    told = [
        one.signs._replace(agreement=signs.agreement(one.completion.text, drawn[i])) if i in drawn else one.signs
        for i, one in enumerate(answered)
    ]
    return [replace(one, signs=found) for one, found in zip(answered, told, strict=True)]


def _signs(completion: Completion) -> Signs:
    ended = [completion.stop_token] if completion.stop_token else []
    return signs.of([(token.logprob, [logprob for _, logprob in token.top]) for token in (*completion.tokens, *ended)])


def _verifier(config: EvaluateSettings) -> Verifier:
    """Raises ConfigInvalid when the judge's key is not to be had."""
    verify = verifier(config.verifier)
    return judged(verify, ModelJudge(config.judge)) if config.judge else verify


def _fit(answered: Sequence[Answered]) -> confidence.Calibrator:
    whole = [a for a in answered if a.whole]
    return confidence.fit_signs([a.signs for a in whole], [a.correct for a in whole])


def _accuracy(answered: Sequence[Answered]) -> dict[str, Any]:
    share = wilson(sum(a.correct for a in answered), len(answered))
    constant = majority([a.example.label for a in answered])
    return {
        "n": share.n,
        "correct": share.k,
        "accuracy": share.rate,
        "wilson95": [share.lo, share.hi],
        "majority": constant.rate,
        "majority_n": constant.k,
        "wins": sum(a.win for a in answered),
        "truncated": sum(not a.whole for a in answered),
    }


def _canaries(unseen: Sequence[Answered]) -> dict[str, Any]:
    right = {key_of(a.example.text).hex(): a.correct for a in unseen}
    return {"n": len(unseen), "correct": sum(a.correct for a in unseen), "right": right}


def _share(answered: Sequence[Answered]) -> dict[str, Any]:
    share = wilson(sum(a.correct for a in answered), len(answered))
    return {"n": share.n, "correct": share.k, "accuracy": share.rate, "wilson95": [share.lo, share.hi]}


def _fits(base_dir: Path, most: int) -> Callable[[Example], bool]:
    tokenizer = base.load_tokenizer(base_dir)
    return lambda item: len(prompts.render(tokenizer, item.prompt)) <= most


def _baselines(
    answered: Sequence[Answered],
    learned: Sequence[Example],
    config: EvaluateSettings,
    ask: Callable[..., list[Answered]],
    fits: Callable[[Example], bool],
) -> dict[str, Any]:
    """What the same items get without training: always the same answer, the nearest example's, the base shown its nearest examples."""
    items = [a.example for a in answered]
    constant = majority([item.label for item in items])
    found: dict[str, Any] = {"majority": _rate(constant), "retrieval": None, "in_context": None}
    if not learned:
        return found
    verify, neighbours = _verifier(config), baselines.Neighbours.of(learned)
    looked_up = zip(items, baselines.copied(items, neighbours), strict=True)
    found["retrieval"] = _rate(wilson(sum(verify(text, item.label, item.facts).right for item, text in looked_up), len(items)))
    asked = items[: config.in_context_items]
    shown = baselines.in_context(asked, neighbours, config.in_context_examples, fits) if asked else []
    found["in_context"] = _share(ask(shown, student=None)) if shown else None
    return found


def _rate(share: Rate) -> dict[str, Any]:
    return {"n": share.n, "correct": share.k, "accuracy": share.rate, "wilson95": [share.lo, share.hi]}


def _domains(answered: Sequence[Answered], reference: Mapping[str, bool]) -> dict[str, Any]:
    """Each domain's share, its change against the reference on the items both answered, and the domain that lost most.

    `worst_domain` is null where there is no reference.
    """
    domains: dict[str, Any] = {}
    for name in sorted({a.domain for a in answered}):
        mine = [a for a in answered if a.domain == name]
        both = [a for a in mine if a.example.text in reference]
        change = sum(a.correct - reference[a.example.text] for a in both) / len(both) if both else None
        domains[name] = {**_share(mine), "change": change, "change_n": len(both)}
    changed = [(told["change"], name) for name, told in domains.items() if told["change"] is not None]
    worst = min(changed, default=None)
    return {"domains": domains, "worst_domain": {"domain": worst[1], "change": worst[0]} if worst else None}


def _reference(file: Path) -> dict[str, bool]:
    """Which items another model got right, from the predictions of its evaluation. Raises TrafficUnreadable."""
    try:
        return {row["prompt"]: bool(row["correct"]) for row in (json.loads(line) for _, line in examples.lines(file))}
    except (ValueError, KeyError, TypeError) as broken:
        raise TrafficUnreadable(f"{file} holds no predictions ({broken!r}); pass what `--predictions` wrote") from broken


def _calibration(answered: Sequence[Answered], calibrator: confidence.Calibrator | None, threshold: float) -> dict[str, Any]:
    """What the calibrator, fitted elsewhere, says of the judged items; nulls where there is none."""
    if calibrator is None:
        return {"ece": None, "mean_confidence": None, "confident": None, "reliability": []}
    probabilities = [a.probability(calibrator) for a in answered]
    correct = [a.correct for a in answered]
    sure = [right for probability, right in zip(probabilities, correct, strict=True) if probability >= threshold]
    return {
        "ece": confidence.ece(probabilities, correct),
        "mean_confidence": sum(probabilities) / len(probabilities),
        "reliability": _reliability(probabilities, correct),
        "confident": {
            "threshold": threshold,
            "n": len(sure),
            "correct": sum(sure),
            "share": len(sure) / len(answered),
            "precision": sum(sure) / len(sure) if sure else None,
        },
    }


def _reliability(probabilities: Sequence[float], correct: Sequence[bool]) -> list[dict[str, float]]:
    """What is told against what is true, in bins of equally many items: a calibrated model's points lie on the diagonal."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    bins = [order[len(order) * b // RELIABILITY_BINS : len(order) * (b + 1) // RELIABILITY_BINS] for b in range(RELIABILITY_BINS)]
    return [
        {"confidence": sum(probabilities[i] for i in inside) / len(inside), "accuracy": sum(correct[i] for i in inside) / len(inside),
         "n": len(inside)}
        for inside in bins if inside
    ]  # fmt: skip


def _write_reliability(bins: Sequence[Mapping[str, float]], file: Path) -> None:
    file.write_text("confidence,accuracy,n\n" + "".join(f"{b['confidence']:.4f},{b['accuracy']:.4f},{b['n']}\n" for b in bins))


def _per_success(answered: Sequence[Answered], core_hour_usd: float) -> dict[str, float | None]:
    """Generated tokens, CPU seconds and dollars for each right answer; the wrong ones are paid for too. Nulls where none is right."""
    right = sum(a.correct for a in answered)
    if not right:
        return {"tokens": None, "core_seconds": None, "usd": None}
    seconds = sum(a.completion.core_seconds for a in answered) / right
    tokens = sum(a.completion.completion_tokens for a in answered) / right
    return {"tokens": tokens, "core_seconds": seconds, "usd": seconds / 3600 * core_hour_usd}


def _speed(answered: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """`seconds` is wall time for all items; tokens per second count generated tokens over it, core seconds are CPU time."""
    generated = sum(a.completion.completion_tokens for a in answered)
    return {
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "core_seconds": sum(a.completion.core_seconds for a in answered),
        "prompt_tokens": sum(a.completion.prompt_tokens for a in answered),
        "completion_tokens": generated,
    }


def _prediction(answered: Answered, calibrator: confidence.Calibrator | None) -> dict[str, Any]:
    return {
        "prompt": answered.example.text,
        "label": answered.example.label,
        "answer": answered.completion.text,
        "score": answered.signs.score,
        "agreement": answered.signs.agreement,
        "probability": answered.probability(calibrator) if calibrator else None,
        "correct": answered.correct,
        "domain": answered.domain,
    }


def _manifest(adapter: Path | None) -> dict[str, Any]:
    """What training wrote beside the adapter; empty for the bare base. Raises AdapterRejected when it cannot be read."""
    if adapter is None:
        return {}
    try:
        manifest: dict[str, Any] = json.loads((adapter / MANIFEST).read_text())
    except (OSError, ValueError) as broken:
        raise AdapterRejected(f"{adapter / MANIFEST} cannot be read ({broken}); pass the folder that training.finetune wrote") from broken
    return manifest


def _longest(items: Sequence[Example], base_dir: Path) -> int:
    tokenizer = base.load_tokenizer(base_dir)
    return max(len(prompts.completion_ids(tokenizer, item.label)) for item in items)


if __name__ == "__main__":
    main()
