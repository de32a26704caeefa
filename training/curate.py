"""Curate: recorded interactions in, four frozen splits out, with the count of rows at every step.

A prompt's split depends on nothing but the prompt, so what is held out once is held out in every later cycle; what asks the same in other
words never crosses a split. This stage holds the order of the steps and what each leaves out; the rules are in `cleaning`, `likeness`,
`mislabels` and `sampling`. It refuses to know models and tokens. Same rows and settings, same bytes, in whatever order they come.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from training import cleaning, examples, likeness, mislabels, sampling, settings
from training.examples import Example
from training.likeness import Asked, Thresholds
from tutelage.errors import TrafficUnreadable
from tutelage.scoring import majority, matches
from tutelage.settings import Home, Strict
from tutelage.verifiers import Verifier, VerifierSettings, verifier

if TYPE_CHECKING:
    import numpy as np

# Upper bounds in hundredths of all prompts. In the code and not in the settings: moving a bound would move prompts that
# were held out into training, and held-out accuracy would mean nothing from then on.
SPLITS = (("train", 66), ("validation", 71), ("calibration", 86), ("test", 100))
# Of a cluster that lies in several splits only the rows of the strictest stay.
STRICTEST = {"test": 0, "calibration": 1, "validation": 2, "train": 3}
SEED = 0

Encode = Callable[[list[str]], "np.ndarray"]
LEARNED = ("train", "validation")


class CurateSettings(Strict):
    """What is kept.

    `max_*`: most rows of each split; `min_*`: fewest, without which training or judging would be pointless. `same_*`: similarity from
    which two prompts with one answer ask the same and may not lie in different splits (Jaccard of words and word pairs, cosine of
    embeddings); `duplicate_*`: from which one of them is enough. `min_teacher_confidence`: leave out what the teacher was known to be less
    sure of (null: nothing; hard rows are worth more than sure ones). `min_judge_score`: leave out what a judge liked less. `later_share`:
    the newest share of the time is kept out of training, so that the held-out rows in it test on later traffic.
    Shares are of the training split: `max_tenant_share` of one tenant among several, `max_student_share` of answers by students
    (`max_depth` generations from a teacher), `max_unchecked_share` of user labels that nothing speaks for.
    """

    max_train: int = Field(default=4000, ge=1)
    max_validation: int = Field(default=32, ge=1)
    max_calibration: int = Field(default=120, ge=1)
    max_test: int = Field(default=110, ge=1)
    min_train: int = Field(default=20, ge=1)
    min_test: int = Field(default=5, ge=1)
    max_characters: int = Field(default=8000, ge=1)
    opted_out: tuple[str, ...] = ()
    personal: cleaning.Personal = "redact"
    same_words: float = Field(default=0.8, gt=0, le=1)
    same_cosine: float = Field(default=0.95, gt=0, le=1)
    duplicate_words: float = Field(default=0.9, gt=0, le=1)
    duplicate_cosine: float = Field(default=0.98, gt=0, le=1)
    verifier: VerifierSettings = VerifierSettings()
    min_teacher_confidence: float | None = Field(default=None, ge=0, le=1)
    min_judge_score: float | None = Field(default=None, ge=0, le=1)
    later_share: float = Field(default=0.0, ge=0, lt=1)
    max_tenant_share: float = Field(default=0.5, gt=0, le=1)
    max_student_share: float = Field(default=0.2, gt=0, le=1)
    max_depth: int = Field(default=1, ge=0)
    max_unchecked_share: float = Field(default=0.2, gt=0, le=1)


@dataclass(frozen=True)
class Row:
    """An example, the key of its prompt as it came, and its embedding where there is one (bytes of float32 [d], unit length)."""

    key: str
    example: Example
    vector: bytes | None = None

    @property
    def split(self) -> str:
        return split_of(self.key)

    @property
    def asked(self) -> Asked:
        return Asked("\n".join(message["content"] for message in self.example.prompt), self.example.label)

    def told(self, name: str) -> Any:
        """What the metadata say."""
        return self.example.metadata.get(name)


class Tally:
    """The counts of every step, in order."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}

    def note(self, step: str, before: int, after: int, left_out: Counter[str] | None = None, **more: Any) -> None:
        self.steps[step] = {
            "in": before,
            "out": after,
            "left_out": {why: count for why, count in sorted((left_out or Counter()).items()) if count},
            **more,
        }

    def sift(self, step: str, rows: Sequence[Row], reasons: Sequence[str | None], **more: Any) -> list[Row]:
        """The rows for which there is no reason to leave them out."""
        kept = [row for row, why in zip(rows, reasons, strict=True) if why is None]
        self.note(step, len(rows), len(kept), Counter(why for why in reasons if why), **more)
        return kept

    def choose(self, step: str, rows: Sequence[Row], chosen: Sequence[int], reason: str) -> list[Row]:
        """The rows of those numbers; all others are left out for one reason."""
        wanted = set(chosen)
        return self.sift(step, rows, [None if at in wanted else reason for at in range(len(rows))])

    @property
    def left_out(self) -> dict[str, int]:
        """By reason, over all steps."""
        total: Counter[str] = Counter()
        for step in self.steps.values():
            total.update(step["left_out"])
        return dict(sorted(total.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.curate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="interactions.jsonl")
    parser.add_argument("--frozen", type=Path, nargs="*", default=[], help="JSONL of other held-out sets that must not be trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four splits and report.json")
    parser.add_argument("--config", type=Path, help="YAML with CurateSettings")
    arguments = parser.parse_args()
    config = settings.read(CurateSettings, arguments.config)
    report = curate(arguments.data, arguments.out, config=config, frozen=arguments.frozen, encode=_encode)
    kept = ", ".join(f"{name} {count}" for name, count in report["splits"].items())
    print(f"curate: {report['rows']} rows in; {kept}; report in {arguments.out / 'report.json'}")


def curate(data: Path, out: Path, *, config: CurateSettings, frozen: Sequence[Path] = (), encode: Encode | None = None) -> dict[str, Any]:
    """Read, clean, split and write; returns the report that is also written to `out/report.json`.

    `encode` gives embeddings to rows that brought none; without it such rows are compared by their words alone, and the report says so.

    Raises:
        TrafficUnreadable: a file cannot be read, or too few rows are left to train and judge on.
    """
    rows, unreadable = read_rows(data)
    tally, total = Tally(), len(rows) + len(unreadable)
    rows = _embedded(deduplicate(clean(rows, config, tally), config, tally), encode)
    rows = separate(rows, config, tally)
    rows = decontaminate(rows, _embedded(_frozen(frozen), encode), config, tally)
    splits = {name: [row for row in rows if row.split == name] for name, _ in SPLITS}
    learned, doubts = teach(splits["train"], config, tally)
    splits["validation"] = tally.sift("validation_answers", splits["validation"], _wrong_answers(splits["validation"], config))
    kept = {"train": learned, **{name: splits[name][: getattr(config, f"max_{name}")] for name in ("validation", "calibration", "test")}}
    kept["train"] = tally.sift("held_out_again", kept["train"], _held_out(kept))
    report = {
        "rows": total,
        "unreadable": unreadable,
        "steps": tally.steps,
        "left_out": tally.left_out,
        "embeddings": _matrix(rows) is not None,
        "splits": {name: len(chosen) for name, chosen in kept.items()},
        "majority": majority([row.example.label for row in kept["train"]]).rate,
        "shares": _shares(kept["train"]),
        "doubted": doubts,
        "frozen": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in frozen},
    }
    _refuse_too_few(report, config, data)
    _write(kept, report, out)
    return report


def split_of(key: str) -> str:
    """The split that a prompt belongs to, now and in every later cycle."""
    hundredth = int(key[:16], 16) % 100
    return next(name for name, bound in SPLITS if hundredth < bound)


def read_rows(data: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Readable rows, and for each unreadable line its number and what was expected there."""
    rows, unreadable = [], []
    for number, line in examples.lines(data):
        try:
            example = examples.parse(line)
        except TrafficUnreadable as broken:
            unreadable.append({"line": number, "problem": broken.message})
        else:
            metadata = dict(example.metadata)
            embedding = metadata.pop("embedding", None)
            rows.append(Row(examples.prompt_key(example.prompt), replace(example, metadata=metadata), _unit(embedding)))
    return rows, unreadable


# --- the steps -------------------------------------------------------------------------------------------------------


def clean(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> list[Row]:
    """One row at a time: who opted out, one spelling, nothing secret or personal, no control tokens, something to judge by."""
    rows = tally.sift("opted_out", rows, ["opted_out" if row.told("tenant") in config.opted_out else None for row in rows])
    spelled = [replace(row, example=cleaning.normalise(row.example)) for row in rows]
    changed = sum(one.example != other.example for one, other in zip(rows, spelled, strict=True))
    tally.note("normalise", len(rows), len(rows), changed=changed)
    scrubbed = [cleaning.scrub(row.example, personal=config.personal) for row in spelled]
    # an embedding of the text as it was still fits the text without the personal part
    rows = [replace(row, example=cleaned.example) for row, cleaned in zip(spelled, scrubbed, strict=True)]
    rows = tally.sift("scrub", rows, [cleaned.reason for cleaned in scrubbed], redacted=sum(c.redacted for c in scrubbed))
    rows = tally.sift("control_tokens", rows, ["control_tokens" if cleaning.has_control_tokens(row.example) else None for row in rows])
    rows = tally.sift("length", rows, ["too_long" if len(row.example.text) > config.max_characters else None for row in rows])
    rows = tally.sift("reference", rows, ["no_reference" if _unjudgeable(row) else None for row in rows])
    # what a student said is learned from within its share, but nobody is right for saying the same
    return tally.sift(
        "students",
        rows,
        ["answered_by_student" if row.told("provenance") == "student" and row.split not in LEARNED else None for row in rows],
    )


def deduplicate(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> list[Row]:
    """One row a prompt, in the order of keys: a right one before a wrong one, then by content, so input order is no matter.

    What the others were answered is kept with it: where it was wrong, it is worth a preference.
    """
    wrong = [reason is not None for reason in _wrong_answers(rows, config)]
    order = sorted(range(len(rows)), key=lambda at: (rows[at].key, wrong[at], json.dumps(rows[at].example.row(), sort_keys=True)))
    best: dict[str, Row] = {}
    others: dict[str, set[str]] = {}
    for row in (rows[at] for at in order):
        first = best.setdefault(row.key, row)
        if not matches(row.example.answer, first.example.label):
            others.setdefault(row.key, set()).add(row.example.answer)
    kept = [_with(row, wrong_answers=sorted(others[key])) if key in others else row for key, row in best.items()]
    tally.note("exact_duplicates", len(rows), len(kept), Counter({"duplicate": len(rows) - len(kept)}))
    return kept


def separate(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> list[Row]:
    """By cluster, then by time: what asks the same as a held-out row is not trained on, nor is what is later than the cut."""
    pairs = likeness.near_pairs([row.asked for row in rows], _matrix(rows), Thresholds(config.same_words, config.same_cosine))
    of = likeness.clusters(len(rows), pairs)
    together = likeness.members(of)
    strictest = {cluster: min(STRICTEST[rows[at].split] for at in inside) for cluster, inside in together.items()}
    sizes = [len(inside) for inside in together.values() if len(inside) > 1]
    kept = tally.sift(
        "clusters",
        rows,
        [None if STRICTEST[row.split] == strictest[of[at]] else f"like_held_out_{row.split}" for at, row in enumerate(rows)],
        clusters=len(sizes),
        largest=max(sizes, default=1),
        by=dict(sorted(Counter(pair.by for pair in pairs).items())),
    )
    cut = _cut(kept, config.later_share)
    kept = [_with(row, later=True) if cut is not None and str(row.told("created_at") or "") >= cut else row for row in kept]
    return tally.sift("time", kept, ["later" if row.told("later") and row.split in LEARNED else None for row in kept], cut=cut)


def decontaminate(rows: Sequence[Row], frozen: Sequence[Row], config: CurateSettings, tally: Tally) -> list[Row]:
    """Nothing to be learned may be, or be like, an item of any frozen held-out set."""
    known = {row.key for row in frozen}
    both = [*rows, *frozen]
    least = Thresholds(config.same_words, config.same_cosine)
    pairs = likeness.near_pairs([row.asked for row in both], _matrix(both), least) if frozen else []
    like = {pair.i for pair in pairs if pair.i < len(rows) <= pair.j}
    reasons = [
        None if row.split not in LEARNED else "frozen" if row.key in known else "like_frozen" if at in like else None
        for at, row in enumerate(rows)
    ]
    return tally.sift("decontaminate", rows, reasons, frozen=len(frozen))


def teach(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> tuple[list[Row], list[dict[str, Any]]]:
    """What is learned from: verified, believed, each only once, within its owner's share, easy and hard alike; and the labels in doubt."""
    rows = tally.sift("answers", rows, _wrong_answers(rows, config))
    rows, doubts = _believed(rows, config, tally)
    unknown = sum(row.told("confidence") is None for row in rows)
    rows = tally.sift("confidence", rows, [_unsure(row, config) for row in rows], unknown=unknown)
    least = Thresholds(config.duplicate_words, config.duplicate_cosine)
    first = likeness.clusters(len(rows), likeness.near_pairs([row.asked for row in rows], _matrix(rows), least))
    rows = tally.choose("near_duplicates", rows, first, "near_duplicate")
    rows = _capped(rows, config, tally)
    domains = [str(row.told("domain") or "") for row in rows]
    chosen = sampling.balanced(domains, [_difficulty(row) for row in rows], config.max_train)
    return tally.choose("sample", rows, chosen, "over_max"), doubts


# --- rules -----------------------------------------------------------------------------------------------------------


def _wrong_answers(rows: Sequence[Row], config: CurateSettings) -> list[str | None]:
    """Whose answer fails: by its user, by a program against the label, or by a judge."""
    verify = verifier(config.verifier)
    return [_wrong_answer(row, verify, config.min_judge_score) for row in rows]


def _wrong_answer(row: Row, verify: Verifier, min_judge_score: float | None) -> str | None:
    if row.told("verdict") == 0 or not verify(row.example.answer, row.example.label, row.example.metadata).right:
        return f"teacher_wrong_{row.split}"
    judged = (row.told("scores") or {}).get("judge")
    return "judged_poor" if min_judge_score is not None and judged is not None and judged < min_judge_score else None


def _unjudgeable(row: Row) -> bool:
    """The teacher was wrong and nobody said what is right: good for neither training nor judging."""
    judged_by_teacher = matches(row.example.answer, row.example.label)
    return row.told("verdict") == 0 and judged_by_teacher


def _unsure(row: Row, config: CurateSettings) -> str | None:
    sure, least = row.told("confidence"), config.min_teacher_confidence
    return "teacher_unsure" if least is not None and row.told("provenance") == "teacher" and sure is not None and sure <= least else None


def _untrusted(row: Row) -> bool:
    """Its label is a user's word alone: no model that was asked said the same."""
    if row.told("provenance") != "user":
        return False
    return not any(matches(str(attempt.get("answer")), row.example.label) for attempt in row.told("attempts") or ())


def _believed(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> tuple[list[Row], list[dict[str, Any]]]:
    """Without user labels that their like contradict; of those that nothing speaks for or against, no more than their share."""
    asked = [row.asked for row in rows]
    untrusted = [_untrusted(row) for row in rows]
    checked = mislabels.check([a.text for a in asked], [a.label for a in asked], untrusted, _matrix(rows), seed=SEED)
    doubts = {doubt.row: doubt for doubt in checked.doubts}
    left = [at for at in range(len(rows)) if at not in doubts]
    unchecked = set(checked.unchecked)
    groups = ["unchecked" if at in unchecked else "checked" for at in left]
    within = {left[n] for n in sampling.within_share(groups, ["unchecked"], config.max_unchecked_share)}
    reasons = ["label_doubted" if at in doubts else None if at in within else "label_unchecked" for at in range(len(rows))]
    told = [
        {"request_id": rows[at].told("request_id"), "tenant": rows[at].told("tenant"), "label": rows[at].example.label,
         "likely": doubt.likely, "reason": doubt.reason}
        for at, doubt in sorted(doubts.items())
    ]  # fmt: skip
    return tally.sift("labels", rows, reasons, untrusted=sum(untrusted), unchecked=len(unchecked)), told


def _capped(rows: Sequence[Row], config: CurateSettings, tally: Tally) -> list[Row]:
    """No tenant over its share, little from students and nothing too many generations from a teacher."""
    rows = tally.sift("depth", rows, ["too_deep" if int(row.told("depth") or 0) > config.max_depth else None for row in rows])
    tenants = [str(row.told("tenant") or "") for row in rows]
    names = sorted(set(tenants))
    share = max(config.max_tenant_share, 1 / max(len(names), 1))
    rows = tally.choose("tenant_share", rows, sampling.within_share(tenants, names if len(names) > 1 else [], share), "over_tenant_share")
    sources = [str(row.told("provenance") or "") for row in rows]
    return tally.choose("provenance", rows, sampling.within_share(sources, ["student"], config.max_student_share), "over_student_share")


def _difficulty(row: Row) -> float | None:
    """How unsure a student was of it where one tried, else how unsure the teacher was."""
    tried = [attempt["confidence"] for attempt in row.told("attempts") or () if attempt.get("confidence") is not None]
    known = min(tried) if tried else row.told("confidence")
    return None if known is None else 1.0 - float(known)


def _cut(rows: Sequence[Row], later_share: float) -> str | None:
    """The time (ISO 8601, UTC) from which rows are later; None where there is no time to go by."""
    times = sorted(str(row.told("created_at")) for row in rows if row.told("created_at"))
    return times[int(len(times) * (1 - later_share))] if times and later_share > 0 else None


def _held_out(splits: dict[str, list[Row]]) -> list[str | None]:
    """Belt and braces: splitting by key already keeps held-out prompts out of train; a fault there must not pass unseen."""
    keys = {row.key for name, kept in splits.items() if name != "train" for row in kept}
    return ["leaked" if row.key in keys else None for row in splits["train"]]


def _with(row: Row, **more: Any) -> Row:
    return replace(row, example=replace(row.example, metadata={**row.example.metadata, **more}))


def _shares(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Rows of the training split by who asked, where from, and about what."""
    return {name: dict(sorted(Counter(str(row.told(name)) for row in rows).items())) for name in ("tenant", "provenance", "domain")}


# --- files -----------------------------------------------------------------------------------------------------------


def _embedded(rows: Sequence[Row], encode: Encode | None) -> list[Row]:
    """The rows with embeddings: those they brought if all did, else all afresh, else none at all."""
    if all(row.vector for row in rows):
        return list(rows)
    if encode is None:
        return [replace(row, vector=None) for row in rows]
    return [replace(row, vector=vector.tobytes()) for row, vector in zip(rows, encode([row.example.text for row in rows]), strict=True)]


def _matrix(rows: Sequence[Row]) -> np.ndarray | None:
    """Unit float32 [n, d]; None unless every row has an embedding of that width."""
    import numpy as np

    if not rows or len({len(row.vector or b"") for row in rows}) != 1 or not rows[0].vector:
        return None
    return np.stack([np.frombuffer(row.vector or b"", dtype=np.float32) for row in rows])


def _unit(embedding: Any) -> bytes | None:
    """Base64 of float16 as unit float32 bytes; None for what is no such thing."""
    import numpy as np

    if not isinstance(embedding, str):
        return None
    vector = np.frombuffer(base64.b64decode(embedding), dtype=np.float16).astype(np.float32)
    return bytes((vector / max(float(np.linalg.norm(vector)), 1e-9)).tobytes())


def _encode(texts: list[str]) -> np.ndarray:
    """By the packaged encoder, exported on first use."""
    from inference.encoder_export import export
    from tutelage.routing.encoder import Encoder

    return Encoder(export(Home.from_environment().models / "encoder"), threads=1).encode(texts)


def _frozen(files: Sequence[Path]) -> list[Row]:
    """The items of other held-out sets; raises TrafficUnreadable when one cannot be read, for nobody knows what it guards."""
    rows = []
    for file in files:
        found, unreadable = read_rows(file)
        if unreadable:
            raise TrafficUnreadable(f"{file} line {unreadable[0]['line']}: {unreadable[0]['problem']}; a frozen set must be whole")
        rows += found
    return rows


def _refuse_too_few(report: dict[str, Any], config: CurateSettings, data: Path) -> None:
    for name, least in (("train", config.min_train), ("test", config.min_test), ("validation", 1)):
        if report["splits"][name] < least:
            why = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items()) or "nothing left out"
            raise TrafficUnreadable(
                f"{data}: of {report['rows']} rows {report['splits'][name]} are left in {name}, at least {least} are needed "
                f"({len(report['unreadable'])} unreadable, {why}); record more traffic, then run curate again"
            )


def _write(splits: dict[str, list[Row]], report: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    for name, kept in splits.items():
        text = _jsonl(kept)
        total.update(text.encode())
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    report["digest"] = total.hexdigest()
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row.example.row(), sort_keys=True, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
