"""Turn text into sentence embeddings with ONNX Runtime on the CPU.

Needs the folder that `python -m inference.encoder_export --out DIR` writes. Knows nothing of torch, of how the model was made
or of what the embeddings are for.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import EngineFailed

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession
    from tokenizers import Encoding

MANIFEST = "manifest.json"
MAX_TOKENS = 256  # the length this model was tuned for; what follows is not read
# No 256 tokens of real text are longer than this, and a megabyte of text must not cost a second of tokenising.
MAX_CHARACTERS = 8192
MOST_COUNTED = 100_000  # characters: to count the tokens of these takes 50 ms
# A batch holds at most this many tokens, padding included: larger ones fall out of the CPU's cache and run slower.
BATCH_TOKENS = 2048
FIRST_WORD = 1000  # of the vocabulary: before it are special tokens and single characters


class EncoderMissing(EngineFailed):
    """The exported encoder is not where it should be."""

    code = "encoder_missing"


class Encoder:
    """The exported sentence encoder; safe to share between threads.

    `threads` bounds the CPU threads of one call. The embeddings of the last `cache_size` different texts are kept.
    Raises EncoderMissing when `model_dir` is not a complete export.
    """

    def __init__(self, model_dir: Path, threads: int = 1, *, cache_size: int = 4096) -> None:
        from tokenizers import Tokenizer

        manifest = _read_manifest(model_dir)
        self.dimension: int = manifest["dimension"]
        self._max_tokens: int = manifest["max_tokens"]
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._session = _open_session(model_dir / "model.onnx", threads)
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embed texts: float32 [n, 384], each row of length 1, in the order of the texts."""
        import numpy as np

        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        rows = self._cached(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in rows}
        if missing:
            fresh = dict(zip(missing, self._compute(list(missing.values())), strict=True))
            rows.update(fresh)
            self._remember(fresh)
        return np.stack([rows[key] for key in keys]) if keys else np.zeros((0, self.dimension), np.float32)

    def count_tokens(self, text: str) -> int:
        """How many word pieces the text has, special tokens not counted; of one longer than MOST_COUNTED as many as its beginning lets
        expect."""
        counted = len(self._tokenizer.encode(_encodable(text[:MOST_COUNTED]), add_special_tokens=False).ids)
        return counted if len(text) <= MOST_COUNTED else round(counted * len(text) / MOST_COUNTED)

    def rarity(self, word: str) -> float:
        """How rare a word is: the logarithm of its rarest piece's place in the vocabulary, which is ordered by frequency, and 2 more for
        a word that the vocabulary has only in pieces; 0 for no word."""
        ids = self._tokenizer.encode(_encodable(word), add_special_tokens=False).ids
        if not ids:
            return 0.0
        return math.log(max(max(ids) - FIRST_WORD, 10)) + (2.0 if len(ids) > 1 else 0.0)

    def _compute(self, texts: list[str]) -> list[np.ndarray]:
        """Run the model over texts of similar length together, so that little padding is computed."""
        shortened = [_encodable(text[:MAX_CHARACTERS]) for text in texts]
        # one text is not worth waking the tokenizer's threads, which sleep on other cores
        encodings = self._tokenizer.encode_batch(shortened) if len(shortened) > 1 else map(self._tokenizer.encode, shortened)
        ids = [_cut(encoding, self._max_tokens) for encoding in encodings]
        rows: dict[int, np.ndarray] = {}
        for batch in _batches([len(row) for row in ids]):
            embedded = self._run([ids[i] for i in batch])
            rows.update(zip(batch, embedded, strict=True))
        return [rows[i] for i in range(len(texts))]

    def _run(self, ids: list[list[int]]) -> np.ndarray:
        import numpy as np

        lengths = np.array([len(row) for row in ids])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        padded = np.zeros_like(mask)
        padded[mask.astype(bool)] = np.concatenate(ids)
        (embedded,) = self._session.run(["sentence_embedding"], {"input_ids": padded, "attention_mask": mask})
        return np.asarray(embedded, dtype=np.float32)

    def _cached(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
            for key in known:
                self._cache.move_to_end(key)
        return known

    def _remember(self, fresh: dict[bytes, np.ndarray]) -> None:
        with self._lock:
            for key, row in fresh.items():
                self._cache[key] = row.copy()  # a view would keep its whole batch alive
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


def _read_manifest(model_dir: Path) -> dict[str, int]:
    missing = [name for name in (MANIFEST, "model.onnx", "tokenizer.json") if not (model_dir / name).is_file()]
    if missing:
        raise EncoderMissing(f"{model_dir} lacks {', '.join(missing)}; run `python -m inference.encoder_export --out {model_dir}`")
    manifest: dict[str, int] = json.loads((model_dir / MANIFEST).read_text())
    return manifest


def _open_session(path: Path, threads: int) -> InferenceSession:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads that spin starve the gateway and the tier on the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Its sum and layer norm in one take four times as long as each by itself (68 against 17 µs for 32 tokens).
    apart = ["SkipLayerNormFusion"]
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=apart)


def _encodable(text: str) -> str:
    """The tokenizer takes no lone surrogates, which JSON can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(encoding: Encoding, limit: int) -> list[int]:
    """The first `limit` ids, still closed by the end token."""
    ids = encoding.ids
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Group row numbers by similar length, each group padded to at most BATCH_TOKENS tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
