"""Decide whether an answer is right, and how sure a share of right answers is.

Pure rules on text and counts. Knows nothing of models, domains, stores or where an answer came from.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_QUOTES_AND_MARKS = "\"'`*“”‘’«»"
# A leading zero makes a code ("007"), not a number, so such text is compared letter by letter.
_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.([0-9]+))?")


@dataclass(frozen=True)
class Rate:
    """A share `k / n` with the bounds of its confidence interval; `n == 0` is rate 0 with bounds 0 and 1."""

    k: int
    n: int
    rate: float
    lo: float
    hi: float


def matches(answer: str, label: str) -> bool:
    """Whether an answer says the same as its label: equal after `canonical`, never by containing it."""
    return canonical(answer) == canonical(label)


def final(text: str) -> str:
    """What a text answers in the end: its last line, of that what follows `Answer:` or the last `=`."""
    last = text.strip().rpartition("\n")[2]
    return last.rpartition("Answer:")[2].rpartition("=")[2].strip()


def canonical(text: str) -> str:
    """The one spelling shared by answers that count as equal.

    Case, spacing, width of letters, outer quotes, outer asterisks and a trailing period carry no meaning; "5", "5.0"
    and "+5" are one number, as are "5000" and "5,000". Text that consists of marks alone stays as it is.
    """
    folded = " ".join(_compatible(text).casefold().split()).replace("−", "-")
    bare = folded.lstrip(_QUOTES_AND_MARKS + " ").rstrip(_QUOTES_AND_MARKS + " .") or folded
    number = _NUMBER.fullmatch(bare)
    return _canonical_number(*number.groups()) if number else bare


def wilson(k: int, n: int, *, confidence: float = 0.95) -> Rate:
    """The share of `k` in `n` with its two-sided interval by Wilson (1927), without continuity correction. SciPy's `binomtest` says the
    same; importing it would hold up whoever asks a gateway for its gaps for a second.

    Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k={k!r} of n={n!r} is no share; pass counts with 0 <= k <= n")
    if n == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), k / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Rate(k, n, share, 0.0 if k == 0 else middle - reach, 1.0 if k == n else middle + reach)


def majority(labels: Sequence[str]) -> Rate:
    """How often the most frequent label is right: what a model that always answers the same would score."""
    counts = Counter(canonical(label) for label in labels)
    return wilson(max(counts.values(), default=0), len(labels))


def _compatible(text: str) -> str:
    """NFKC, except that 10² stays apart from 102 and ½ from 1⁄2: there the form carries the meaning."""
    kept = ("<super>", "<sub>", "<fraction>")
    letters = (c if unicodedata.decomposition(c).startswith(kept) else unicodedata.normalize("NFKC", c) for c in text)
    return unicodedata.normalize("NFC", "".join(letters))


def _canonical_number(sign: str, whole: str, fraction: str | None) -> str:
    digits = whole.replace(",", "")
    tail = (fraction or "").rstrip("0")
    value = f"{digits}.{tail}" if tail else digits
    return f"-{value}" if sign == "-" and value != "0" else value
