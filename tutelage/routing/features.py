"""What a prompt looks like, as numbers: hashed words and letters, and its surface (length, numbers, choices, code).

Needs no vocabulary, so a stored model is small and a new word is no error. Knows nothing of outcomes, models or the encoder.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.routing.encoder import MAX_CHARACTERS

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

BUCKET_BITS = 15
BUCKETS = 1 << BUCKET_BITS
LETTER_GRAMS = (2, 3, 4)  # bytes of UTF-8, none across a space
MIX = 2654435761  # Knuth (1998), 6.4: the high bits of the product are well mixed

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d[\d.,]*")
_CHOICE = re.compile(r"^\s*\(?[A-J][.)] (.*)$", re.MULTILINE)
_SENTENCE = re.compile(r"[.!?](?:\s|$)")
_NEGATION = re.compile(r"\b(not|except|least|incorrect|false|never)\b", re.IGNORECASE)
_CATCH_ALL = re.compile(r"\b(all|none|both) of (the )?(above|these)\b", re.IGNORECASE)
_FRACTION = re.compile(r"\d+/\d+")
_CODE = re.compile(r"\bdef |\breturn\b|[{};]\s*$|\bimport ", re.MULTILINE)
SYMBOLS = frozenset("+-*/=^<>()[]{}$\\|~")


def surface(prompt: str) -> list[float]:
    """Counts and shares that need no understanding; always as many, each of order 1."""
    text = prompt[:MAX_CHARACTERS]
    words, numbers, choices = text.split(), _NUMBER.findall(text), [len(choice) for choice in _CHOICE.findall(text)]
    length, count, spread = len(text) + 1, len(words) + 1, _spread(choices)
    return [
        _log(len(text)),
        _log(len(text) - sum(choices)),
        _log(len(words)),
        sum(map(len, words)) / count,
        _log(len(numbers)),
        len(numbers) / count,
        max((len(number) for number in numbers), default=0) / 4,
        sum("." in number.strip(".,") for number in numbers) / count,
        float(bool(_FRACTION.search(text))),
        float("%" in text or "percent" in text),
        _log(sum(choices)),
        float(len(choices)),
        spread,
        10 * sum(character in SYMBOLS for character in text) / length,
        10 * sum(map(str.isupper, text)) / length,
        float(text.count("?")),
        _log(len(_SENTENCE.findall(text))),
        _log(text.count("\n")),
        float(bool(_NEGATION.search(text))),
        float(bool(_CATCH_ALL.search(text))),
        float("__" in text or "..." in text or "…" in text),
        float(bool(_CODE.search(text))),
        float('"' in text or "'" in text),
        float(not text.isascii()),
    ]


def word_buckets(prompt: str) -> np.ndarray:
    """Bucket of each word and each pair of neighbours, int64, repeated as often as they occur."""
    import numpy as np

    words = _WORD.findall(prompt[:MAX_CHARACTERS].lower())
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    pairs = hashes[:-1] * np.uint64(31) + hashes[1:]
    return _bucket(np.concatenate([hashes, pairs]))


def letter_buckets(prompt: str) -> np.ndarray:
    """Bucket of each run of 2 to 4 bytes within a word or at its edge, int64, repeated as often as they occur."""
    import numpy as np

    text = " " + " ".join(prompt[:MAX_CHARACTERS].lower().split()) + " "
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint64)
    blank = codes == ord(" ")
    found = []
    for size in LETTER_GRAMS:
        count = len(codes) - size + 1
        if count < 1:
            break
        grams = np.zeros(count, dtype=np.uint64)
        across = np.zeros(count, dtype=bool)
        for offset in range(size):
            grams = grams * np.uint64(257) + codes[offset : offset + count] + np.uint64(1)
            if 0 < offset < size - 1:
                across |= blank[offset : offset + count]
        found.append(grams[~across])
    return _bucket(np.concatenate(found))


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms of one prompt: `buckets` int64 ascending, `weights` float32 of length 1 (TF-IDF, sublinear)."""

    buckets: np.ndarray
    weights: np.ndarray


def rarity(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Inverse document frequency of each bucket, float32 [BUCKETS], smoothed as in scikit-learn's TfidfTransformer."""
    import numpy as np

    frequency = np.zeros(BUCKETS)
    for buckets in rows:
        frequency[np.unique(buckets)] += 1
    return (np.log((1 + len(rows)) / (1 + frequency)) + 1).astype(np.float32)


def weigh(buckets: np.ndarray, idf: np.ndarray) -> Terms:
    """The terms of one prompt from its buckets."""
    import numpy as np

    seen, counts = np.unique(buckets, return_counts=True)
    weights = (1.0 + np.log(counts)) * idf[seen]
    length = float(np.sqrt(weights @ weights))
    return Terms(seen, (weights / length if length else weights).astype(np.float32))


def matrix(rows: Sequence[Terms]) -> csr_matrix:
    """The terms of many prompts: [n, BUCKETS]."""
    import numpy as np
    from scipy.sparse import csr_matrix

    ends = np.cumsum([0, *(len(row.buckets) for row in rows)])
    values = np.concatenate([row.weights for row in rows]) if rows else np.zeros(0, np.float32)
    columns = np.concatenate([row.buckets for row in rows]) if rows else np.zeros(0, np.int64)
    return csr_matrix((values, columns, ends), shape=(len(rows), BUCKETS))


def _bucket(hashes: np.ndarray) -> np.ndarray:
    import numpy as np

    mixed = (hashes * np.uint64(MIX)) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(32 - BUCKET_BITS)).astype(np.int64)


def _log(count: float) -> float:
    return math.log1p(max(count, 0))


def _spread(lengths: Sequence[int]) -> float:
    """Standard deviation of the choices' lengths, in units of 30 characters."""
    if not lengths:
        return 0.0
    mean = sum(lengths) / len(lengths)
    return float((sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5 / 30)
