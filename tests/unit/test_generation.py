"""The engine: what a batch answers is what each request alone would be answered."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import TINY_CONTEXT, build_tiny_adapter, build_tiny_base, build_tiny_taught_adapter

from inference import base, prompts
from inference.generation import Completion, ContextExceeded, Engine, Request, Token
from tutelage.errors import AdapterRejected, InvalidRequest, ModelNotFound

ANSWER = "blue wünder"
CLOSE = 1e-4  # float32 sums in another order
EXACT = base.Precision("float32", "what is compared here must not depend on the machine")


@dataclass(frozen=True)
class World:
    base_dir: Path
    folders: dict[str, Path]
    digests: dict[str, str]

    def engine(self) -> Engine:
        engine = Engine(self.base_dir, threads=1, precision=EXACT)
        for name, folder in self.folders.items():
            engine.load_adapter(name, folder, self.digests[name])
        return engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    base_dir = build_tiny_base(root / "base")
    folders = {name: root / name for name in ("one", "two", "taught")}
    digests = {
        "one": build_tiny_adapter(base_dir, folders["one"], seed=1),
        "two": build_tiny_adapter(base_dir, folders["two"], seed=2),
        "taught": build_tiny_taught_adapter(base_dir, folders["taught"], answer=ANSWER),
    }
    return World(base_dir, folders, digests)


@pytest.fixture(scope="module")
def shared(world: World) -> Engine:
    """An engine for tests that leave its adapters alone."""
    return world.engine()


@pytest.fixture
def engine(world: World) -> Engine:
    return world.engine()


def ask(text: str, adapter: str | None = None, max_tokens: int = 12, **more: Any) -> Request:
    return Request([{"role": "user", "content": text}], adapter, max_tokens, **more)


def mixed() -> list[Request]:
    return [
        ask("What is the answer?", "taught"),
        ask("Spell the word backward: stressed", "one", 9),
        ask("hi", "two", 5),
        ask("How many brothers and sisters does Alice have? Answer with one word, please.", None, 12),
        ask("What is the answer?", "two", 12),
    ]


def test_a_batch_across_adapters_answers_as_each_request_alone(shared: Engine) -> None:
    together = shared.generate(mixed())
    alone = [shared.generate([request])[0] for request in mixed()]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)


def test_adapters_change_answers_and_each_answer_names_its_adapter(shared: Engine, world: World) -> None:
    names = [None, "one", "two"]
    answers = shared.generate([ask("What is the answer?", name) for name in names])
    assert len({c.text for c in answers}) == 3
    assert [c.adapter_digest for c in answers] == [None, world.digests["one"], world.digests["two"]]


@pytest.mark.parametrize("name", [None, "one"])
def test_greedy_log_probabilities_equal_a_plain_forward(shared: Engine, world: World, name: str | None) -> None:
    import torch
    from peft import PeftModel

    request = ask("Add the numbers: 12 and 30", name, 8)
    [answer] = shared.generate([request])
    model: Any
    model, tokenizer = base.load(world.base_dir, quantization=base.SERVING, precision=EXACT)
    if name:
        model = PeftModel.from_pretrained(model, world.folders[name]).eval()
    prompt = prompts.render(tokenizer, request.messages)
    ids = [token.id for token in answer.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == ids
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert [token.logprob for token in answer.tokens] == pytest.approx(expected.tolist(), abs=CLOSE)


def test_left_padding_does_not_change_an_answer(shared: Engine) -> None:
    short = ask("hi", "one", 10)
    long = ask("How many brothers and sisters? " * 12, "one", 10)
    [alone] = shared.generate([short])
    padded, _ = shared.generate([short, long])
    assert padded.text == alone.text
    assert padded.logprobs == pytest.approx(alone.logprobs, abs=CLOSE)


def test_the_stop_token_ends_an_answer_and_counts_in_its_score(shared: Engine) -> None:
    [answer] = shared.generate([ask("What is the answer?", "taught", 40)])
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    assert answer.stop_token is not None
    assert answer.stop_token.text == "<|im_end|>"
    assert len(answer.logprobs) == len(answer.tokens) + 1 == answer.completion_tokens
    assert answer.logprobs[-1] == answer.stop_logprob


def test_tokens_joined_are_the_text_also_across_characters_of_several_tokens(shared: Engine) -> None:
    [answer] = shared.generate([ask("What is the answer?", "taught", 40)])
    assert "".join(token.text for token in answer.tokens) == answer.text
    assert any(token.text == "" for token in answer.tokens)


def test_an_answer_that_reaches_max_tokens_says_so(shared: Engine) -> None:
    [answer] = shared.generate([ask("What is the answer?", "taught", 3)])
    assert (answer.finish_reason, answer.completion_tokens, answer.stop_logprob) == ("length", 3, None)


def test_a_stop_string_ends_an_answer_before_it(shared: Engine) -> None:
    [answer] = shared.generate([ask("What is the answer?", "taught", 40, stop=(" w", "never"))])
    assert (answer.text, answer.finish_reason, answer.stop_token) == ("blue", "stop", None)


def test_a_seed_repeats_a_sampled_answer_alone_and_in_a_batch(shared: Engine) -> None:
    sampled = ask("hello", "one", 10, temperature=1.5, seed=7)
    [alone] = shared.generate([sampled])
    again = shared.generate([ask("hi there", "two", 10, temperature=1.0, seed=1), sampled])[1]
    assert again.text == alone.text
    others = {shared.generate([replace(sampled, seed=seed)])[0].text for seed in range(4)}
    assert len(others) > 1


@pytest.mark.parametrize("top_p", [0.0, 1e-6])
def test_a_tiny_nucleus_is_greedy(shared: Engine, top_p: float) -> None:
    greedy = ask("hello", "one", 8)
    [expected] = shared.generate([greedy])
    [sampled] = shared.generate([replace(greedy, temperature=2.0, top_p=top_p, seed=3)])
    assert sampled.text == expected.text


def test_log_probabilities_do_not_depend_on_the_temperature(shared: Engine) -> None:
    greedy = ask("hello", "one", 4)
    [plain] = shared.generate([greedy])
    [warm] = shared.generate([replace(greedy, temperature=0.01, seed=1)])
    assert warm.logprobs == pytest.approx(plain.logprobs, abs=CLOSE)


def test_top_logprobs_are_sorted_and_hold_the_greedy_choice(shared: Engine) -> None:
    [answer] = shared.generate([ask("hello", "one", 3, top_logprobs=5)])
    for token in answer.tokens:
        values = [value for _, value in token.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(token.logprob)
        assert math.fsum(math.exp(value) for value in values) <= 1 + CLOSE


def test_tokens_and_completions_are_told_as_they_happen(shared: Engine) -> None:
    told: list[tuple[str, int]] = []
    texts: dict[int, str] = defaultdict(str)

    def on_token(index: int, token: Token) -> None:
        told.append(("token", index))
        texts[index] += token.text

    finished: dict[int, Completion] = {}

    def on_finish(index: int, completion: Completion) -> None:
        told.append(("finish", index))
        finished[index] = completion

    requests = [ask("hi", "one", 2), ask("hi", "two", 9)]
    answers = shared.generate(requests, on_token=on_token, on_finish=on_finish)
    assert [finished[0], finished[1]] == answers
    assert [texts[0], texts[1]] == [c.text for c in answers]
    assert told.index(("finish", 0)) < len(told) - 4, "a short row is complete before the long one"


def test_a_cancelled_row_is_dropped_and_its_neighbour_is_not_disturbed(shared: Engine) -> None:
    seen: dict[int, int] = defaultdict(int)

    def on_token(index: int, _token: Token) -> None:
        seen[index] += 1

    requests = [ask("hi", "one", 30), ask("hello", "two", 12)]
    cancelled, kept = shared.generate(requests, on_token=on_token, cancelled=lambda i: i == 0 and seen[0] >= 2)
    assert (cancelled.finish_reason, cancelled.completion_tokens) == ("cancelled", 2)
    assert kept.text == shared.generate(requests[1:])[0].text


def test_core_seconds_are_shared_out_completely(world: World) -> None:
    ticks = iter(range(1000))
    engine = Engine(world.base_dir, threads=1, cpu_clock=lambda: float(next(ticks)))
    answers = engine.generate([ask("hi", None, 3), ask("hello there", None, 6)])
    assert math.fsum(c.core_seconds for c in answers) == pytest.approx(6.0)
    assert 0 < answers[0].core_seconds < answers[1].core_seconds


def test_an_unknown_adapter_is_refused_before_anything_runs(shared: Engine) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        shared.generate([ask("hi"), ask("hi", "nobody")])


def test_what_does_not_fit_the_context_is_refused(shared: Engine) -> None:
    with pytest.raises(ContextExceeded, match=str(TINY_CONTEXT)):
        shared.check(ask("word " * 2 * TINY_CONTEXT))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        shared.check(ask("hi", max_tokens=0))


def test_no_requests_are_no_answers(shared: Engine) -> None:
    assert shared.generate([]) == []


def test_a_pinned_adapter_outlives_its_name(engine: Engine, world: World) -> None:
    request = ask("hello", "one", 6)
    [before] = engine.generate([request])
    pinned = engine.pin("one")
    engine.load_adapter("one", world.folders["two"], world.digests["two"])
    [still] = engine.generate([replace(request, adapter=pinned.key)])
    [now] = engine.generate([request])
    assert (still.text, still.adapter_digest) == (before.text, world.digests["one"])
    assert now.adapter_digest == world.digests["two"]
    engine.unpin(pinned)
    engine.generate([request])
    with pytest.raises(ModelNotFound):
        engine.generate([replace(request, adapter=pinned.key)])


def test_an_unloaded_adapter_is_gone_and_the_base_answers_as_ever(engine: Engine) -> None:
    [before] = engine.generate([ask("hello")])
    for name in list(engine.adapters()):
        engine.unload_adapter(name)
    assert engine.adapters() == {}
    [after] = engine.generate([ask("hello")])
    assert after.logprobs == pytest.approx(before.logprobs, abs=CLOSE)
    with pytest.raises(ModelNotFound):
        engine.unload_adapter("one")


def test_a_refused_adapter_leaves_the_old_one_serving(engine: Engine, world: World, tmp_path: Path) -> None:
    other = build_tiny_base(tmp_path / "other", seed=9)
    foreign = build_tiny_adapter(other, tmp_path / "foreign", seed=1)
    [before] = engine.generate([ask("hello", "one", 6)])
    with pytest.raises(AdapterRejected, match="trained on base"):
        engine.load_adapter("one", tmp_path / "foreign", foreign)
    [after] = engine.generate([ask("hello", "one", 6)])
    assert (after.text, after.adapter_digest) == (before.text, world.digests["one"])


def test_an_adapter_for_layers_this_base_lacks_is_refused(engine: Engine, world: World, tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    from inference import adapters, base

    weights = load_file(world.folders["one"] / adapters.WEIGHTS)
    misfit = {name.replace("layers.1", "layers.7"): tensor for name, tensor in weights.items()}
    save_file(misfit, tmp_path / adapters.WEIGHTS)
    (tmp_path / adapters.CONFIG).write_text((world.folders["one"] / adapters.CONFIG).read_text())
    (tmp_path / adapters.MANIFEST).write_text(json.dumps({"base_fingerprint": base.fingerprint(world.base_dir)}))
    with pytest.raises(AdapterRejected, match=r"layers\."):
        engine.load_adapter("misfit", tmp_path, adapters.digest(tmp_path))
    assert "misfit" not in engine.adapters()
    assert engine.generate([ask("hello", "one", 4)])[0].completion_tokens == 4


def test_an_adapter_loads_while_a_batch_runs(engine: Engine, world: World) -> None:
    halfway, loaded = threading.Event(), threading.Event()

    def load() -> None:
        halfway.wait(timeout=10)
        engine.load_adapter("late", world.folders["two"], world.digests["two"])
        loaded.set()

    def on_token(_index: int, _token: Token) -> None:
        halfway.set()

    thread = threading.Thread(target=load)
    thread.start()
    [answer] = engine.generate([ask("hello", "one", 200)], on_token=on_token)
    thread.join(timeout=10)
    assert loaded.is_set()
    assert answer.text == engine.generate([ask("hello", "one", 200)])[0].text
