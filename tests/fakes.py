"""Everything the tests use in place of the real thing, in one file.

`build_tiny_*` write real files in the real formats, only small: a random Llama with a tokenizer of its own, and LoRA
adapters for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY_CONTEXT = 512
TINY_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What the tiny tokenizer learns its merges from, beside numbers; fixed, so that it never changes.
TINY_TEXT = """
You are a helpful assistant. What is the answer? The answer is yes or no, red, green or blue. How many brothers and sisters
does Alice have? Add the numbers and give the next number in the sequence. Which category does this headline belong to:
world, sports, business or technology? Spell the word backward. Who is the mother of the father of the daughter of Bob?
Answer with one word. Question, please respond with only the relationship between them, as it is usually called in English.
"""

# SmolLM2's own template, so that tests render what production renders.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny_base(base_dir: Path, *, seed: int = 0) -> Path:
    """Write a random 2-layer Llama (hidden 64) and a byte-level BPE tokenizer of about 1,000 tokens, as safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,  # wide, so that greedy answers differ between prompts and adapters
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # The padding token is the stop token too: its embedding must not stay zero, or no training could produce it.
        torch.nn.init.normal_(model.model.embed_tokens.weight.data[tokenizer.pad_token_id], std=0.2)
    base_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(base_dir))
    tokenizer.save_pretrained(str(base_dir))
    return base_dir


def build_tiny_adapter(base_dir: Path, out_dir: Path, *, seed: int = 0, scale: float = 1.0) -> str:
    """Write a random LoRA adapter for a base, with its manifest, and return its digest. `scale` multiplies lora_B."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _tiny_lora(base_dir)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2 * scale)
    return _save_adapter(model, base_dir, out_dir)


def build_tiny_taught_adapter(base_dir: Path, out_dir: Path, *, answer: str, steps: int = 60, seed: int = 0) -> str:
    """Write an adapter that was trained, in a second or two, to give `answer` and stop, and return its digest."""
    import torch

    from inference import base, prompts

    tokenizer = base.load_tokenizer(base_dir)
    prompt = prompts.render(tokenizer, [{"role": "user", "content": "What is the answer?"}])
    completion = prompts.completion_ids(tokenizer, answer)
    ids = torch.tensor([prompt + completion])
    labels = torch.tensor([[-100] * len(prompt) + completion])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _tiny_lora(base_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _save_adapter(model, base_dir, out_dir)


def _tiny_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT + " ".join(str(n) for n in range(2000))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        unk_token=special[0],
        chat_template=CHAT_TEMPLATE,
    )


def _tiny_lora(base_dir: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    from inference import base

    model, _ = base.load(base_dir, quantization=base.SERVING, precision=base.Precision("float32", "tests"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TINY_TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _save_adapter(model: Any, base_dir: Path, out_dir: Path) -> str:
    from inference import adapters, base

    model.save_pretrained(str(out_dir))
    (out_dir / "README.md").unlink(missing_ok=True)
    manifest = {"base_fingerprint": base.fingerprint(base_dir)}
    (out_dir / "manifest.json").write_text(json.dumps(manifest))
    return adapters.digest(out_dir)


class FakeModelServer:
    """An OpenAI-compatible chat server on a real port: answers every prompt with `answer`, or misbehaves as told.

    `status` other than 200: every request fails with it. `break_after`: a stream is cut after that many chunks, `tail` being the
    last it says. `delay`: seconds
    before a reply and before each chunk. `left`: clients that hung up in mid-stream. With `logprob`, replies carry one token of
    that log-probability; `fingerprint` is their `system_fingerprint`. `in_turn`: what it answers first, one after the other. With
    `core_seconds`, usage says that a reply took them, as a tier's does. Enter it to start.
    """

    def __init__(self, answer: str = "4", *, logprob: float | None = None, fingerprint: str | None = None) -> None:
        self.answer, self.logprob, self.fingerprint = answer, logprob, fingerprint
        self.status = 200
        self.break_after: int | None = None
        self.tail = b""
        self.usage = True
        self.delay = 0.0
        self.left = 0
        self.in_turn: list[str] = []
        self.core_seconds: float | None = None
        self.requests: list[dict[str, Any]] = []

    def __enter__(self) -> FakeModelServer:
        import socket
        import threading
        import time

        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)

    async def _chat(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        asked = await request.json()
        self.requests.append(asked)
        if self.status != 200:
            return JSONResponse({"error": {"message": f"fake failure {self.status}"}}, status_code=self.status)
        if asked.get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        await asyncio.sleep(self.delay)
        said = self.says(asked)
        if said is None:
            return JSONResponse({"error": {"message": f"no model {asked['model']}"}}, status_code=404)
        answer, fingerprint = said
        sure = self.logprob or 0.0
        likeliest = [{"token": answer, "logprob": sure, "bytes": None}, {"token": "?", "logprob": sure - 3.0, "bytes": None}]
        token = {**likeliest[0], "top_logprobs": likeliest[: asked.get("top_logprobs") or 0]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer},
            "finish_reason": "stop",
            "logprobs": None if self.logprob is None else {"content": [token]},
        }
        body: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": [choice], "system_fingerprint": fingerprint}
        if self.usage:
            body["usage"] = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
            body["usage"] |= {} if self.core_seconds is None else {"core_seconds": self.core_seconds}
        return JSONResponse(body)

    def says(self, asked: dict[str, Any]) -> tuple[str, str | None] | None:
        """Answer and fingerprint; None where nobody of that name is here."""
        return self.in_turn.pop(0) if self.in_turn else self.answer, self.fingerprint

    async def _stream(self) -> Any:
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": part}, "finish_reason": None}]} for part in self.answer
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.usage:
            chunks.append({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}})
        try:
            for number, chunk in enumerate(chunks):
                if self.break_after is not None and number >= self.break_after:
                    yield self.tail
                    return
                await asyncio.sleep(self.delay)
                yield f"data: {json.dumps(chunk)}\n\n".encode()
        except asyncio.CancelledError:
            self.left += 1
            raise
        yield b"data: [DONE]\n\n"


class FakeTier(FakeModelServer):
    """A tier that holds adapters: `held` has each one's answer and digest by its name. All are sure of what they say."""

    def __init__(self, **held: tuple[str, str]) -> None:
        super().__init__(logprob=-0.01)
        self.held = held

    def says(self, asked: dict[str, Any]) -> tuple[str, str | None] | None:
        return self.held.get(asked["model"])


class FakeJudge(FakeModelServer):
    """A judge with a rule: it says `prefers(first, second)` of the two answers it is shown. Both ways round may be asked at once."""

    def __init__(self, prefers: Callable[[str, str], str] = lambda first, second: "TIE") -> None:
        super().__init__()
        self.prefers = prefers

    def says(self, asked: dict[str, Any]) -> tuple[str, str | None]:
        text = asked["messages"][-1]["content"]
        first, second = (text.partition(f"<{name}>\n")[2].partition(f"\n</{name}>")[0] for name in ("first", "second"))
        return self.prefers(first, second), None


class FakeTeacher(FakeModelServer):
    """A teacher that answers each prompt by `answers` and, where it is asked, with the log-probabilities that `logprobs` gives its answer.

    Asked to explain itself it gives `reasons` and the same answer. `logprobs` returns OpenAI's `content`: a token, its log-probability and
    its `top_logprobs` for each token.
    """

    def __init__(self, answers: dict[str, str], *, logprobs: Any = None, reasons: str = "Because.") -> None:
        super().__init__()
        self.answers, self.logprobs, self.reasons = answers, logprobs, reasons

    async def _chat(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        asked = await request.json()
        self.requests.append(asked)
        if self.status != 200:
            return JSONResponse({"error": {"message": "fake failure"}}, status_code=self.status)
        prompt, wants_reasons, _ = asked["messages"][-1]["content"].partition("\n\nExplain the reasoning")
        answer = self.answers[prompt]
        text = f"{self.reasons}\nAnswer: {answer}" if wants_reasons else answer
        content = {"content": self.logprobs(answer)} if asked.get("logprobs") and self.logprobs else None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": content}
        return JSONResponse({"id": "x", "object": "chat.completion", "choices": [choice]})


class FakeFineTuning:
    """OpenAI's files and fine-tuning jobs on a real port, as far as a student needs them. Enter it to start.

    Files are checked as OpenAI checks them (JSONL, roles, at least ten rows) and refused with its error shape. A job goes one step on with
    every look at it: validating_files, queued, running, and then `ends` ("succeeded", "failed", "cancelled"). `break_after_create`: the
    reply to the next job's creation is lost, though the job is there.
    """

    STEPS = ("validating_files", "queued", "running")

    def __init__(self, *, ends: str = "succeeded") -> None:
        self.ends = ends
        self.break_after_create = False
        self.files: dict[str, list[dict[str, Any]]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> FakeFineTuning:
        import socket
        import threading
        import time

        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/fine_tuning/jobs", self._create, methods=["POST"]),
            Route("/v1/fine_tuning/jobs", self._list, methods=["GET"]),
            Route("/v1/fine_tuning/jobs/{job}", self._look, methods=["GET"]),
        ]
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)

    async def _upload(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        form = await request.form()
        raw = (await form["file"].read()).decode()
        try:
            rows = [json.loads(line) for line in raw.splitlines()]
            for row in rows:
                turns = row["messages"] if "messages" in row else [*row["input"]["messages"], *row["preferred_output"]]
                assert {turn["role"] for turn in turns} <= {"system", "user", "assistant"} and turns[-1]["role"] == "assistant"
            assert len(rows) >= 10 and form["purpose"] == "fine-tune"
        except (ValueError, KeyError, AssertionError):
            error = {"message": "Invalid file format", "type": "invalid_request_error", "code": "invalid_file", "param": "file"}
            return JSONResponse({"error": error}, status_code=400)
        name = f"file-{len(self.files)}"
        self.files[name] = rows
        return JSONResponse(
            {"id": name, "object": "file", "bytes": len(raw), "created_at": 0, "filename": "x.jsonl", "purpose": "fine-tune"}
        )

    async def _create(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        asked = await request.json()
        if asked["training_file"] not in self.files:
            error = {"message": "no such file", "type": "invalid_request_error", "code": "invalid_training_file", "param": "training_file"}
            return JSONResponse({"error": error}, status_code=400)
        name = f"ftjob-{len(self.jobs)}"
        self.jobs[name] = {
            "id": name, "object": "fine_tuning.job", "created_at": 0, "model": asked["model"], "organization_id": "org",
            "seed": asked["seed"], "training_file": asked["training_file"], "validation_file": None,
            "result_files": [], "hyperparameters": {"n_epochs": 3},
            "status": self.STEPS[0], "fine_tuned_model": None, "finished_at": None, "trained_tokens": None, "error": None,
            "method": asked["method"],
        }  # fmt: skip
        if self.break_after_create:
            self.break_after_create = False
            return JSONResponse(
                {"error": {"message": "lost", "type": "server_error"}}, status_code=409, headers={"x-should-retry": "false"}
            )
        return JSONResponse(self.jobs[name])

    async def _list(self, _request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": list(self.jobs.values())[::-1], "has_more": False})

    async def _look(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        job = self.jobs[request.path_params["job"]]
        shown = dict(job)
        if job["status"] in self.STEPS:
            at = self.STEPS.index(job["status"]) + 1
            job["status"] = self.STEPS[at] if at < len(self.STEPS) else self.ends
            if job["status"] == "succeeded":
                job |= {"fine_tuned_model": f"ft:{job['model']}:org::1", "trained_tokens": 123}
            elif job["status"] not in self.STEPS:
                job["error"] = {"code": "bad", "message": "the data are bad", "param": None}
        return JSONResponse(shown)
