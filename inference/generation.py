"""One base, many adapters, one batch: the engine that evaluation measures and the tier serves.

Knows torch, the KV cache and sampling. It refuses to know HTTP, queues and who asks. A batch runs to its end; requests that
arrive meanwhile belong to the next one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inference import base, prompts
from inference.adapters import AdapterInfo
from inference.rack import AdapterRack, Attached
from inference.sampling import Sampling, choose
from inference.transcript import Token, Transcript
from tutelage.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

__all__ = ["Completion", "ContextExceeded", "Engine", "FinishReason", "Request", "Token"]

FinishReason = Literal["stop", "length", "cancelled"]


class ContextExceeded(InvalidRequest):
    """Prompt and answer together do not fit the base's context."""

    code = "context_length_exceeded"


@dataclass(frozen=True)
class Request:
    """One generation. `adapter` is a loaded name, a pinned key or None for the bare base; `temperature` 0 is greedy."""

    messages: Sequence[dict[str, Any]]
    adapter: str | None
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer. Log probabilities are the model's own, whatever the temperature.

    `stop_token` is the end-of-turn token when that ended the answer; it is not part of `text` or `tokens`.
    `completion_tokens` counts every generated token, the stop token included. `core_seconds` is this answer's share of
    the CPU time its batch burned.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    core_seconds: float
    adapter_digest: str | None
    stop_token: Token | None = None
    completion_tokens: int = 0

    @property
    def stop_logprob(self) -> float | None:
        return self.stop_token.logprob if self.stop_token else None

    @property
    def logprobs(self) -> list[float]:
        """What confidence is computed from: every answer token, then the stop token if there was one."""
        ended = [self.stop_token.logprob] if self.stop_token else []
        return [token.logprob for token in self.tokens] + ended


@dataclass
class _Row:
    """One request while it is being answered."""

    index: int
    request: Request
    adapter: Attached | None
    prompt: list[int]
    sampling: Sampling
    transcript: Transcript
    decoder: Any
    generated: int = 0
    core_seconds: float = 0.0
    stop_token: Token | None = None
    finish_reason: FinishReason | None = None


@dataclass
class _Batch:
    """The rows still running and the tensors that belong to them; row i of each tensor is rows[i]."""

    rows: list[_Row]
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: Any = field(default=None)


class Engine:
    """Generates with one base and the adapters loaded into it.

    `generate` belongs to one thread at a time; loading and unloading may happen from others while it runs and take effect
    between two steps. `threads` 0 leaves torch's own choice, no `quantization` what suits the base (`base.serving`).
    """

    def __init__(
        self,
        base_dir: Path,
        *,
        threads: int,
        quantization: base.Quantization | None = None,
        precision: base.Precision | None = None,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        import torch

        if threads > 0:
            torch.set_num_threads(threads)
        self.fingerprint = base.fingerprint(base_dir)
        self._model, self._tokenizer = base.load(base_dir, quantization=quantization or base.serving(base_dir), precision=precision)
        self.context = int(self._model.config.get_text_config().max_position_embeddings)
        self._stop_ids = _stop_ids(self._model, self._tokenizer)
        self._cpu_clock = cpu_clock
        self._rack = AdapterRack(self._model, base_fingerprint=self.fingerprint)
        self._tokenizer_lock = threading.Lock()  # the tokenizer switches modes while it encodes

    def load_adapter(self, name: str, adapter_dir: Path, digest: str) -> AdapterInfo:
        """Verify an adapter and serve it as `name`, replacing the one of that name for requests that start later.

        Raises AdapterRejected, in which case whatever `name` served before keeps serving.
        """
        return self._rack.load(name, adapter_dir, digest=digest)

    def unload_adapter(self, name: str) -> None:
        """Stop serving `name`; requests that already use it finish. Raises ModelNotFound."""
        self._rack.unload(name)

    def adapters(self) -> dict[str, str]:
        """Return the digest of every adapter by the name it is served under."""
        return self._rack.digests()

    def pin(self, name: str) -> Attached:
        """Return the adapter that `name` means now; its `key` serves as `Request.adapter` until `unpin`, even if the name
        comes to mean another adapter or goes. Raises ModelNotFound.
        """
        [held] = self._rack.hold([name])
        assert held is not None
        return held

    def unpin(self, pinned: Attached) -> None:
        """Give back what `pin` returned. Never blocks."""
        self._rack.release([pinned], sweep=False)

    def check(self, request: Request) -> int:
        """Return the prompt's length in tokens. Raises what `generate` would: InvalidRequest or ModelNotFound."""
        if request.adapter is not None:
            self._rack.digest(request.adapter)
        return len(self._prompt(request))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, Token], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Completion]:
        """Answer all requests in one batch and return their completions in order.

        `on_token(i, token)` is called as soon as a token of request i is certain, `on_finish(i, completion)` as soon as its
        answer is complete, both in this thread. When `cancelled(i)` turns true the row is dropped at the next step and
        its completion has finish_reason "cancelled". Raises InvalidRequest or ModelNotFound before anything runs.
        """
        if not requests:
            return []
        done: dict[int, Completion] = {}

        def finish(row: _Row) -> None:
            done[row.index] = completion = self._completion(row)
            if on_finish:
                on_finish(row.index, completion)

        prepared = [self._prompt(request) for request in requests]
        held = self._rack.hold([request.adapter for request in requests])
        try:
            rows = [self._row(i, request, held[i], prepared[i]) for i, request in enumerate(requests)]
            self._decode(rows, on_token or _ignore_token, finish, cancelled or _never)
        finally:
            self._rack.release(held)
        return [done[index] for index in range(len(requests))]

    def _row(self, index: int, request: Request, adapter: Attached | None, prompt: list[int]) -> _Row:
        from tokenizers.decoders import DecodeStream

        sampling = Sampling(request.temperature, request.top_p, _generator(request))
        decoder = DecodeStream(skip_special_tokens=True)
        return _Row(index, request, adapter, prompt, sampling, Transcript(request.stop), decoder)

    def _prompt(self, request: Request) -> list[int]:
        if request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {request.max_tokens}; allowed is 1 or more", param="max_tokens")
        with self._tokenizer_lock:
            ids = prompts.render(self._tokenizer, request.messages)
        if len(ids) + request.max_tokens > self.context:
            raise ContextExceeded(
                f"the prompt has {len(ids)} tokens and max_tokens is {request.max_tokens}; together they may be "
                f"{self.context} at most: shorten the messages or ask for fewer tokens",
                param="messages",
            )
        return ids

    def _decode(
        self,
        rows: list[_Row],
        on_token: Callable[[int, Token], None],
        finish: Callable[[_Row], None],
        cancelled: Callable[[int], bool],
    ) -> None:
        import torch

        started = self._cpu_clock()
        batch = self._pad(rows)
        weights = [len(row.prompt) for row in rows]  # prefill costs by prompt length, a step the same for every row
        with torch.inference_mode():
            while batch.rows:
                logits = self._forward(batch)
                self._extend(batch, logits, on_token)
                for row in batch.rows:
                    if row.finish_reason is None and cancelled(row.index):
                        row.finish_reason = "cancelled"
                now = self._cpu_clock()
                _share(now - started, batch.rows, weights)
                started = now
                for row in batch.rows:
                    if row.finish_reason is not None:
                        finish(row)
                _drop_finished(batch)
                weights = [1] * len(batch.rows)

    def _pad(self, rows: list[_Row]) -> _Batch:
        """Left-pad the prompts to [rows, longest]; positions count real tokens only, so padding changes no answer."""
        import torch

        longest = max(len(row.prompt) for row in rows)
        pad = self._stop_ids[0]  # masked everywhere, any id does
        ids = [[pad] * (longest - len(row.prompt)) + row.prompt for row in rows]
        seen = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        mask = torch.tensor(seen, device=self._model.device)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return _Batch(list(rows), torch.tensor(ids, device=self._model.device), mask, positions)

    def _forward(self, batch: _Batch) -> torch.Tensor:
        """Run the batch's new ids through the model; return the last position's float32 logits [rows, vocabulary]."""
        with self._rack.forward([row.adapter for row in batch.rows]):
            output = self._model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        batch.cache = output.past_key_values
        # Some bases pad their vocabulary: ids beyond the tokenizer's must never be chosen.
        logits: torch.Tensor = output.logits[:, -1, : len(self._tokenizer)].float()
        return logits

    def _extend(self, batch: _Batch, logits: torch.Tensor, on_token: Callable[[int, Token], None]) -> None:
        """Choose each row's next token, note it, and set up the batch for the next step."""
        import torch

        chosen = choose(logits, [row.sampling for row in batch.rows])
        logprobs = torch.log_softmax(logits, dim=-1)
        picked = logprobs.gather(1, chosen[:, None].to(logprobs.device))[:, 0].tolist()
        for i, (row, token_id) in enumerate(zip(batch.rows, chosen.tolist(), strict=True)):
            self._note(row, token_id, picked[i], self._top(row, logprobs[i]), on_token)
        batch.ids = chosen[:, None].to(batch.mask.device)
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        batch.positions = batch.positions[:, -1:] + 1

    def _note(
        self,
        row: _Row,
        token_id: int,
        logprob: float,
        top: tuple[tuple[str, float], ...],
        on_token: Callable[[int, Token], None],
    ) -> None:
        row.generated += 1
        if token_id in self._stop_ids:
            row.stop_token = Token(token_id, self._token_text(token_id), logprob, top)
            row.finish_reason = "stop"
            released = row.transcript.close()
        else:
            text = row.decoder.step(self._tokenizer.backend_tokenizer, token_id) or ""
            released = row.transcript.add(Token(token_id, text, logprob, top))
            if row.transcript.stopped:
                row.finish_reason = "stop"
            elif row.generated >= row.request.max_tokens:
                row.finish_reason = "length"
                released = [*released, *row.transcript.close()]
        for token in released:
            on_token(row.index, token)

    def _top(self, row: _Row, logprobs: torch.Tensor) -> tuple[tuple[str, float], ...]:
        if row.request.top_logprobs == 0:
            return ()
        best = logprobs.topk(row.request.top_logprobs)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple((self._token_text(token_id), value) for token_id, value in pairs)

    def _token_text(self, token_id: int) -> str:
        return str(self._tokenizer.backend_tokenizer.decode([token_id], skip_special_tokens=False))

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            text=row.transcript.text,
            tokens=tuple(row.transcript.tokens),
            finish_reason=row.finish_reason or "cancelled",
            prompt_tokens=len(row.prompt),
            core_seconds=row.core_seconds,
            adapter_digest=row.adapter.digest if row.adapter else None,
            stop_token=row.stop_token,
            completion_tokens=row.generated,
        )


def _share(core_seconds: float, rows: list[_Row], weights: list[int]) -> None:
    for row, weight in zip(rows, weights, strict=True):
        row.core_seconds += core_seconds * weight / math.fsum(weights)


def _drop_finished(batch: _Batch) -> None:
    """Keep only running rows, in the cache too, so that finished ones cost nothing more."""
    import torch

    keep = [i for i, row in enumerate(batch.rows) if row.finish_reason is None]
    if len(keep) == len(batch.rows):
        return
    batch.rows = [batch.rows[i] for i in keep]
    if not keep:
        return
    chosen = torch.tensor(keep, device=batch.mask.device)
    batch.ids, batch.mask, batch.positions = batch.ids[chosen], batch.mask[chosen], batch.positions[chosen]
    batch.cache.batch_select_indices(chosen)


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    named = model.generation_config.eos_token_id
    also = named if isinstance(named, list) else [named]
    first = prompts.stop_id(tokenizer)
    return (first, *(i for i in also if isinstance(i, int) and i != first))


def _generator(request: Request) -> torch.Generator | None:
    import torch

    if request.temperature == 0:
        return None
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return generator


def _ignore_token(_index: int, _token: Token) -> None:
    pass


def _never(_index: int) -> bool:
    return False
