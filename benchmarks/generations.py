"""Ten generations of one student, each trained on what its domain's traffic has become: does it go on knowing what it knew?

    python -m benchmarks.generations --work DIR [--tiny] [--generations 10]

Cut off, it goes on from the last trained version when it is started again in the same folder with the same options.

Traffic drifts: signals come and fade, a window of the newest requests is all that can be learned from (a busy tenant's), the teacher is
wrong now and then, and in two bad generations half of the time. What curates, trains, examines, keeps canaries, judges and rolls out is
what production runs. Both arms see the same candidates: in one the gate and the rollout decide, in the control the newest always serves.
What is measured stands on frozen items of every generation that no file of the loop ever held. A rollout's live pairs are answers of both
versions to every request of the next generation, in the order they come, where production takes those that users judged.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flows.gate import _evidence, _tokens, _too_good, kept, paired
from flows.students import CHAMPIONS, EARLIER, unasked
from inference import adapters, base
from inference.generation import Engine
from training import curate, evaluate, finetune, settings
from training.curate import CurateSettings
from training.distill import DistillSettings, distill
from training.evaluate import EvaluateSettings
from training.examples import Example
from training.recipe import FinetuneSettings
from tutelage.evolution.canaries import Canary, blocked, drawn, key_of, rotate
from tutelage.evolution.evidence import Tally
from tutelage.evolution.gaps import EvolveSettings
from tutelage.evolution.outcomes import contest
from tutelage.evolution.promotion import PromotionSettings, compared, judge
from tutelage.evolution.rollout import Rollout, RolloutSettings, step
from tutelage.scoring import matches, wilson
from tutelage.settings import CHECKOUT, Home, load
from tutelage.verifiers import verifier

DOMAIN = "signals"
ACTIONS = ("stop", "go", "wait", "turn", "call", "run")
COLOURS = ("red", "green", "amber", "blue", "white", "violet", "pink", "grey", "brown", "black", "orange", "gold", "silver", "teal", "lime")
SHAPES = ("ring", "bar")
PLACES = ("harbour", "station", "bridge", "market", "school", "museum", "garden", "tower", "castle", "square", "river", "church")
BAD, WRONG, WRONG_WHEN_BAD = (5, 8), 0.03, 0.5  # generations (from 1) of a bad teacher; shares of wrong answers
TOLD = 0.5  # share of answers that a user judges and corrects
TINY = {"budget_tokens": 60_000, "probe_tokens": 12_000, "learning_rate": 0.004, "step_examples": 8, "max_epochs": 12}


@dataclass(frozen=True)
class Asked:
    """A request: its prompt, the right answer and the teacher's, and whether a user said so."""

    prompt: str
    label: str
    answer: str
    told: bool

    @property
    def example(self) -> Example:
        return Example(({"role": "user", "content": self.prompt},), self.label, self.label)


@dataclass(frozen=True)
class Version:
    """A trained candidate and what its examination said."""

    number: int
    folder: Path
    report: dict[str, Any]
    manifest: dict[str, Any]


@dataclass
class Arm:
    """Who serves, and since then who is on the way to it, with its pairs so far."""

    champion: Version | None = None
    challenger: tuple[Version, Tally] | None = None


@dataclass(frozen=True)
class Row:
    """One generation: what the gate said of its candidate, who serves in the gated arm, and each arm's share right on the frozen items of
    all earlier generations and of this one; `falls` in points against the same arm's best on the same earlier items, with the interval."""

    generation: int
    action: str
    reason: str
    rollout: str
    serves: int | None
    earlier_n: int
    gated_earlier: float | None
    ungated_earlier: float | None
    gated_now: float | None
    ungated_now: float | None
    falls: dict[str, tuple[float, float, float]] = field(default_factory=dict)


class Traffic:
    """The domain's requests by generation; everything is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._signals = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        self._rng.shuffle(self._signals)
        self._meaning = {signal: self._rng.choice(ACTIONS) for signal in self._signals}

    def generation(self, number: int, count: int) -> list[Asked]:
        """Signals are 3 new ones a generation, whose share halves with every later one."""
        known = self._signals[: 3 * number]
        weights = [0.5 ** (number - 1 - at // 3) for at in range(len(known))]
        return [self._asked(number, self._rng.choices(known, weights)[0]) for _ in range(count)]

    def _asked(self, number: int, signal: str) -> Asked:
        prompt = f"The light at the {self._rng.choice(PLACES)} number {self._rng.randrange(10_000)} shows a {signal}. What do you do?"
        label = self._meaning[signal]
        wrong = self._rng.random() < (WRONG_WHEN_BAD if number in BAD else WRONG)
        answer = self._rng.choice([action for action in ACTIONS if action != label]) if wrong else label
        return Asked(prompt, label, answer, self._rng.random() < TOLD)


class Bench:
    """The loop without its database and processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        configs = CHECKOUT / "configs"
        self.work, self.base_dir, self.threads = options.work, options.base, options.threads
        self.evolve = load(EvolveSettings, configs)
        self.promotion, self.stages = load(PromotionSettings, configs), load(RolloutSettings, configs)
        self.curation = settings.read(CurateSettings, configs / "curate.yaml")
        self.distillation = settings.read(DistillSettings, configs / "distill.yaml")
        recipe = settings.read(FinetuneSettings, configs / "finetune.yaml").model_copy(update={"threads": options.threads})
        self.recipe = recipe.model_copy(update=TINY) if options.tiny else recipe
        judging = settings.read(EvaluateSettings, configs / "evaluate.yaml")
        self.judging = judging.model_copy(update={"in_context_items": 0, "untrained_items": 10, "threads": options.threads})
        self.encoder = _encoder(options.encoder)
        self.engine = Engine(self.base_dir, threads=options.threads)
        self.log: list[tuple[dict[str, Any], np.ndarray]] = []
        self.held: list[Canary] = []
        self.canaries: dict[bytes, dict[str, Any]] = {}
        self._answers: dict[tuple[int, str], bool] = {}

    def record(self, asked: Sequence[Asked], generation: int) -> None:
        """The requests as the interactions that a student is exported from; their canaries are kept, whatever leaves the window."""
        vectors = self.encoder.encode([one.prompt for one in asked])
        lines = [_line(one, vector, len(self.log) + at) for at, (one, vector) in enumerate(zip(asked, vectors, strict=True))]
        self.log += list(zip(lines, vectors, strict=True))
        keys = [key_of(one.prompt) for one in asked]
        fresh = [Canary(key, vector, generation) for key, vector in zip(keys, vectors, strict=True) if drawn(key)]
        self.held = rotate(self.held, fresh, size=self.evolve.canaries, quarter=generation)
        self.canaries |= {key: line for key, line in zip(keys, lines, strict=True) if drawn(key)}

    def train(self, number: int, window: int) -> Version:
        """A fresh student from the newest `window` requests, examined; one that an earlier run in this folder trained is taken as it is."""
        folder = self.work / f"v{number}"
        if not (folder / "adapter" / "manifest.json").exists():
            self._learn(folder, number, window)
        if not (folder / "report.json").exists():
            report = evaluate.evaluate(
                folder / "adapter", folder / "curated" / "test.jsonl", base_dir=self.base_dir, config=self.judging,
                calibration=folder / "curated" / "calibration.jsonl", predictions=folder / "predictions.jsonl",
                canaries=folder / "canaries.jsonl",
            )  # fmt: skip
            (folder / "evaluate.yaml").write_text(json.dumps(self.judging.model_dump(mode="json")))
            (folder / "report.json").write_text(json.dumps(report))
        report, manifest = (json.loads((folder / name).read_text()) for name in ("report.json", "adapter/manifest.json"))
        self.engine.load_adapter(str(number), folder / "adapter", adapters.digest(folder / "adapter"))
        return Version(number, folder, report, manifest)

    def _learn(self, folder: Path, number: int, window: int) -> None:
        rows = self.log[-window:]
        keys = [key_of(line["messages"][0]["content"]) for line, _ in rows]
        near = blocked(keys, np.stack([vector for _, vector in rows]), self.held, similar=self.evolve.canary_similarity)
        exported = [line for (line, _), key, close in zip(rows, keys, near, strict=True) if not close and not drawn(key)]
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "interactions.jsonl", exported)
        _write(folder / "canaries.jsonl", [self.canaries[canary.key] for canary in self.held])
        curated = folder / "curated"
        curate.curate(folder / "interactions.jsonl", curated, config=self.curation)
        distill(curated / "train.jsonl", folder / "distilled", config=self.distillation, base_dir=self.base_dir)
        finetune.finetune(
            folder / "distilled" / "train.jsonl", folder / "adapter", validation=curated / "validation.jsonl", base_dir=self.base_dir,
            config=self.recipe.model_copy(update={"seed": number}), curve=folder / "curve.csv", say=lambda _line: None,
        )  # fmt: skip

    def right(self, version: Version, asked: Sequence[Asked]) -> list[bool]:
        """Which requests a version answers rightly; each is asked once."""
        fresh = [one for one in asked if (version.number, one.prompt) not in self._answers]
        if fresh:
            tokens = version.manifest["max_answer_tokens"] + self.judging.extra_tokens
            verify = verifier(self.judging.verifier)
            answered = evaluate.answer(
                self.engine, [one.example for one in fresh], student=str(version.number), max_tokens=tokens, batch=self.judging.batch,
                verify=verify,
            )  # fmt: skip
            for one, reply in zip(fresh, answered, strict=True):
                self._answers[version.number, one.prompt] = matches(reply.completion.text, one.label)
        return [self._answers[version.number, one.prompt] for one in asked]

    def decide(self, arm: Arm, candidate: Version) -> tuple[str, str]:
        """The gate's verdict on the candidate, and what follows of it."""
        pairs = Tally()
        evidence = _evidence(candidate.report, candidate.manifest, None, _too_good(candidate.report))
        if arm.champion is not None:
            self._ask_each_other(candidate, arm.champion)
            pairs = paired(candidate.folder, arm.champion.folder)
            price, champions = (_tokens(version.report) for version in (candidate, arm.champion))
            comparison = compared(pairs, domain=DOMAIN, price=price, champion_price=champions)
            earlier = kept(candidate.report, arm.champion.report, candidate.folder, arm.champion.folder)
            evidence = replace(evidence, comparison=comparison, kept=earlier)
        verdict = judge(evidence, self.promotion)
        if verdict.action in ("promote", "keep"):
            arm.champion = candidate
        if verdict.action == "challenge":
            arm.challenger = (candidate, pairs)
        return verdict.action, verdict.reason

    def _ask_each_other(self, candidate: Version, champion: Version) -> None:
        """As `flows.students` does: both answer the other's held-out items."""
        config = self.judging.model_copy(update={"untrained_items": 0})
        for asked, owner, answers in ((champion, candidate, CHAMPIONS), (candidate, champion, EARLIER)):
            target = candidate.folder / answers
            if unasked(owner.folder, asked.folder, target.parent, settings=candidate.folder / "evaluate.yaml"):
                items = target.with_name("unasked.jsonl")
                evaluate.evaluate(asked.folder / "adapter", items, base_dir=self.base_dir, config=config, predictions=target)

    def roll_out(self, arm: Arm, asked: Sequence[Asked]) -> str:
        """The challenger's way over a generation's requests: to the champion's place, to its end, or undecided until a newer one comes."""
        if arm.challenger is None or arm.champion is None:
            return ""
        (challenger, pairs), champion = arm.challenger, arm.champion
        price, champions = (_tokens(version.report) for version in (challenger, champion))
        mine, theirs = self.right(challenger, asked), self.right(champion, asked)
        percent, at_stage, arm.challenger = 0, Tally(), None
        for count, (one, other) in enumerate(zip(mine, theirs, strict=True), start=1):
            pairs, at_stage = pairs + contest(one, other), at_stage + contest(one, other)
            comparison = compared(pairs, domain=DOMAIN, price=price, champion_price=champions)
            taken = step(Rollout(percent, comparison, at_stage), self.stages, self.promotion, needed=self.promotion.evidence)
            if taken.action in ("promote", "stop"):
                arm.champion = challenger if taken.action == "promote" else champion
                return f"v{challenger.number} {taken.action} after {count}"
            if taken.action == "advance":
                percent, at_stage = taken.percent, Tally()
        return f"v{challenger.number} undecided after {len(mine)}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The generations, told as they pass; what is known so far is always in `result.json`."""
    bench, traffic = Bench(options), Traffic(options.seed)
    gated, ungated = Arm(), Arm()
    frozen: list[list[Asked]] = []
    history: dict[str, list[Version | None]] = {"gated": [], "ungated": []}
    rows: list[Row] = []
    for number in range(1, options.generations + 1):
        asked = traffic.generation(number, options.requests)
        frozen.append(list({one.prompt: one for one in traffic.generation(number, options.items)}.values()))
        rolled = bench.roll_out(gated, asked)
        bench.record(asked, number)
        candidate = bench.train(number, options.window * options.requests)
        action, reason = bench.decide(gated, candidate)
        ungated.champion = candidate
        for name, arm in (("gated", gated), ("ungated", ungated)):
            history[name].append(arm.champion)
        rows.append(_row(bench, number, (action, reason, rolled), history, frozen))
        _tell(rows[-1])
        result = summary(rows, options)
        (options.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(rows, options.work / "generations.svg")
    return result


def summary(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Each arm's worst fall with its interval, and where it stands in the end."""
    worst = {arm: max(((row.falls[arm], row.generation) for row in rows if arm in row.falls), default=None) for arm in ("gated", "ungated")}
    return {
        "base": "tiny, random" if options.tiny else options.base.name,
        "requests_a_generation": options.requests, "window_generations": options.window, "frozen_items_a_generation": options.items,
        "seed": options.seed, "bad_generations": BAD,
        "worst_fall": {
            arm: {"points": 100 * found[0][0], "interval95": [100 * b for b in found[0][1:]], "generation": found[1]}
            for arm, found in worst.items() if found is not None
        },
        "generations": [asdict(row) for row in rows],
    }  # fmt: skip


def fall(best: Sequence[bool], now: Sequence[bool]) -> tuple[float, float, float]:
    """How much of the share right on the same items is lost: items lost less items won, over all. The 95 % bounds are those of both shares
    (Wilson) taken together, which is wider than need be; a bootstrap would call nothing lost in 60 a certainty."""
    lost, won = (
        wilson(sum(a and not b for a, b in pairs), len(best)) for pairs in (zip(best, now, strict=True), zip(now, best, strict=True))
    )
    return lost.rate - won.rate, lost.lo - won.hi, lost.hi - won.lo


def plot(rows: Sequence[Row], file: Path) -> None:
    """Share right on the frozen items of all earlier generations, and on the newest, by generation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2, sharey=True), ("earlier", "now"), ("of all earlier generations", "of this one"), strict=True
    ):
        for arm, colour in (("gated", "#0a7d6c"), ("ungated", "#b3382f")):
            values = [getattr(row, f"{arm}_{what}") for row in rows]
            axes.plot([row.generation for row in rows], [math.nan if v is None else v for v in values], "o-", color=colour, label=arm)
        axes.set(title=f"frozen items {title}", xlabel="generation", ylim=(0, 1.03))
        axes.legend()
    figure.supylabel("share right")
    figure.savefig(file)


def _row(
    bench: Bench, number: int, said: tuple[str, str, str], history: dict[str, list[Version | None]], frozen: Sequence[Sequence[Asked]]
) -> Row:
    earlier = [one for items in frozen[:-1] for one in items]
    served = {arm: versions[-1] for arm, versions in history.items()}

    def share(version: Version | None, items: Sequence[Asked]) -> float | None:
        return wilson(sum(bench.right(version, items)), len(items)).rate if version is not None and items else None

    falls = {arm: worst for arm, versions in history.items() if (worst := _worst(bench, versions, frozen)) is not None}
    serves = served["gated"]
    return Row(
        number, *said, None if serves is None else serves.number, len(earlier),
        share(served["gated"], earlier), share(served["ungated"], earlier),
        share(served["gated"], frozen[-1]), share(served["ungated"], frozen[-1]), falls,
    )  # fmt: skip


def _worst(bench: Bench, versions: Sequence[Version | None], frozen: Sequence[Sequence[Asked]]) -> tuple[float, float, float] | None:
    """Of all earlier moments when another version served: what it knew of the frozen items of then, against what is known of them now."""
    now, found = versions[-1], []
    for moment, then in enumerate(versions[:-1], start=1):
        if then is not None and now is not None and then is not now:
            items = [one for part in frozen[:moment] for one in part]
            found.append(fall(bench.right(then, items), bench.right(now, items)))
    return max(found, default=None)


def _line(one: Asked, vector: np.ndarray, number: int) -> dict[str, Any]:
    """As `tutelage.lessons.lesson` writes a teacher's answer."""
    from tutelage.lessons import lesson

    row = {
        "tier": "teacher", "finish_reason": "stop", "answer": one.answer, "messages": [{"role": "user", "content": one.prompt}],
        "feedback_label": one.label if one.told else None, "feedback_score": float(matches(one.answer, one.label)) if one.told else None,
        "request_id": f"r{number}", "domain": DOMAIN, "model": "teacher", "confidence": None, "attempts": [],
        "created_at": _Moment(number), "embedding": np.asarray(vector, np.float32).tobytes(),
    }  # fmt: skip
    found = lesson(row, "tenant")
    if found is None:
        raise ValueError(f"request {number} teaches nothing")
    return found


@dataclass(frozen=True)
class _Moment:
    number: int

    def isoformat(self) -> str:
        return f"2026-01-01T00:00:{self.number:09d}"


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


def _encoder(folder: Path) -> Any:
    from inference.encoder_export import export
    from tutelage.routing.encoder import Encoder

    return Encoder(export(folder), threads=1)


def _tell(row: Row) -> None:
    def percent(value: float | None) -> str:
        return "   –" if value is None or math.isnan(value) else f"{100 * value:4.0f}"

    if row.generation == 1:
        print("gen  gate       serves  earlier: gated ungated   now: gated ungated   rollout")
    print(
        f"{row.generation:3}  {row.action:9}  {'-' if row.serves is None else 'v' + str(row.serves):6}  "
        f"{percent(row.gated_earlier):>14} {percent(row.ungated_earlier):>7} {percent(row.gated_now):>12} {percent(row.ungated_now):>7}   "
        f"{row.rollout}   {row.reason}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for versions, result.json and generations.svg")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", type=Path, help="base model folder (default: the packaged one, under TUTELAGE_HOME)")
    which.add_argument("--tiny", action="store_true", help="a tiny random base, as the tests use")
    parser.add_argument("--encoder", type=Path, help="encoder folder (default: made in --work)")
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--requests", type=int, default=600, help="of a generation")
    parser.add_argument("--window", type=int, default=3, help="generations whose requests can be learned from")
    parser.add_argument("--items", type=int, default=60, help="frozen items of a generation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    settings.without_bars()
    options.work.mkdir(parents=True, exist_ok=True)
    options.encoder = options.encoder or options.work / "encoder"
    if options.tiny:
        from tests.fakes import build_tiny_base

        options.base = options.work / "base"
        if not (options.base / "config.json").exists():
            build_tiny_base(options.base)
    options.base = options.base or base.materialise(Home.from_environment().models)
    result = run(options)
    print(json.dumps({key: value for key, value in result.items() if key != "generations"}, indent=2))


if __name__ == "__main__":
    main()
