"""The tier over HTTP: in process, as `bentoml serve`, and as a Bento that carries its student."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes import build_tiny_adapter, build_tiny_base, build_tiny_taught_adapter

from bentos.tier.app import DIGEST_HEADER, MAX_BODY_BYTES, Tier, create_app, start_tier
from bentos.tier.batcher import Overloaded
from bentos.tier.settings import ServiceSettings, from_environment
from inference import base
from inference.generation import Completion, Engine, Request
from tutelage.errors import ConfigInvalid, ModelNotFound
from tutelage.settings import CHECKOUT

ANSWER = "blue wünder"
TOKEN = "a-token-of-the-tier-tests"
QUESTION = [{"role": "user", "content": "What is the answer?"}]
READY_SECONDS = 180.0


@dataclass(frozen=True)
class World:
    """Students lie under `students`; `elsewhere` is a good adapter outside of it."""

    root: Path
    base_dir: Path
    students: Path
    elsewhere: Path
    digests: dict[str, str]

    def files(self, name: str) -> dict[str, str]:
        return {"path": str(self.students / name), "digest": self.digests[name]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    students = root / "students"
    base_dir = build_tiny_base(root / "base")
    other = build_tiny_base(root / "other", seed=5)
    digests = {
        "one": build_tiny_adapter(base_dir, students / "one", seed=1),
        "two": build_tiny_adapter(base_dir, students / "two", seed=2),
        "taught": build_tiny_taught_adapter(base_dir, students / "taught", answer=ANSWER),
        "foreign": build_tiny_adapter(other, students / "foreign", seed=3),
    }
    shutil.copytree(students / "one", root / "elsewhere")
    return World(root, base_dir, students, root / "elsewhere", digests)


@dataclass(frozen=True)
class Served:
    tier: Tier
    client: httpx.AsyncClient

    async def put(self, name: str, files: dict[str, str], token: str = TOKEN) -> httpx.Response:
        return await self.client.put(f"/control/adapters/{name}", json=files, headers={"authorization": f"Bearer {token}"})

    async def chat(self, model: str = "base", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": QUESTION, "max_tokens": 12, **more}
        return await self.client.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def serving(world: World, **settings: Any) -> AsyncIterator[Served]:
    asked = {"student_roots": (world.students,), "token": TOKEN, "threads": 1, **settings}
    tier = await start_tier(world.base_dir, ServiceSettings(**asked))
    app = create_app()
    app.state.tier = tier
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://tier") as client:
            yield Served(tier, client)
    finally:
        await tier.close()


@pytest.fixture
async def served(world: World) -> AsyncIterator[Served]:
    async with serving(world) as served:
        for name in ("one", "two", "taught"):
            assert (await served.put(name, world.files(name))).status_code == 200
        yield served


def error(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error object, which every refusal has."""
    body = response.json()
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert "Traceback" not in response.text
    return dict(body["error"])


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_reply_names_its_adapter_and_what_it_cost(served: Served, world: World) -> None:
    response = await served.chat("taught")
    body = response.json()
    assert response.status_code == 200
    assert body["choices"][0]["message"]["content"] == ANSWER
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["system_fingerprint"] == response.headers[DIGEST_HEADER] == world.digests["taught"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["core_seconds"] > 0


async def test_the_base_answers_under_its_own_fingerprint(served: Served, world: World) -> None:
    body = (await served.chat("base", max_tokens=3)).json()
    assert body["system_fingerprint"] == base.fingerprint(world.base_dir)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


async def test_logprobs_end_with_the_stop_token_so_that_a_client_can_score_the_answer(served: Served) -> None:
    [choice] = (await served.chat("taught", logprobs=True, top_logprobs=2)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content[:-1]) == ANSWER
    assert content[-1]["token"] == "<|im_end|>"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert -1.0 < math.fsum(entry["logprob"] for entry in content) < 0.0


async def test_logprobs_of_a_cut_answer_have_no_stop_token(served: Served) -> None:
    [choice] = (await served.chat("taught", logprobs=True, max_tokens=2)).json()["choices"]
    assert len(choice["logprobs"]["content"]) == 2
    assert choice["finish_reason"] == "length"


async def test_a_stream_carries_the_same_answer(served: Served, world: World) -> None:
    whole = (await served.chat("taught", logprobs=True)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await served.chat("taught", logprobs=True, **options)
    *parts, usage = chunks(response.text)
    choices = [part["choices"][0] for part in parts]
    assert response.headers[DIGEST_HEADER] == world.digests["taught"]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in content] == [e["token"] for e in whole["choices"][0]["logprobs"]["content"]]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_requests_of_several_adapters_share_batches_and_answer_as_alone(served: Served) -> None:
    names = ["one", "two", "taught", "base"] * 4
    alone = {name: (await served.chat(name)).json()["choices"][0]["message"]["content"] for name in set(names)}
    together = await asyncio.gather(*(served.chat(name) for name in names))
    assert [r.json()["choices"][0]["message"]["content"] for r in together] == [alone[name] for name in names]


async def test_models_lists_the_base_and_every_adapter_with_its_digest(served: Served, world: World) -> None:
    listed = (await served.client.get("/v1/models")).json()["data"]
    assert {card["id"]: card["digest"] for card in listed} == {
        "base": base.fingerprint(world.base_dir),
        **{name: world.digests[name] for name in ("one", "two", "taught")},
    }


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"stop": [""]}, 400, None),
        ({"stop": ["a"] * 5}, 400, None),
        ({"seed": 2**70}, 400, "seed"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, None),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, 400, None),
        ({"stream": "yes"}, 400, "stream"),
    ],
)
async def test_a_request_at_fault_is_told_where(served: Served, change: dict[str, Any], status: int, param: str | None) -> None:
    response = await served.chat(**{"model": "base", **change})
    assert response.status_code == status
    told = error(response)
    assert told["type"] == "invalid_request_error"
    assert param is None or told["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"temperature": NaN}'])
async def test_a_body_that_is_no_request_is_refused(served: Served, body: bytes) -> None:
    response = await served.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    error(response)


async def test_an_oversized_body_is_refused(served: Served) -> None:
    response = await served.client.post("/v1/chat/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert (response.status_code, error(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 404)])
async def test_a_path_that_does_not_exist_is_refused_in_the_same_shape(served: Served, method: str, path: str, status: int) -> None:
    response = await served.client.request(method, path)
    assert response.status_code == status
    error(response)


async def test_a_tier_that_is_still_loading_says_so() -> None:
    transport = httpx.ASGITransport(app=create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://tier") as client:
        response = await client.get("/v1/models")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0


async def test_adapters_come_and_go_without_a_restart(served: Served, world: World) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    first = (await served.chat("one")).json()
    assert (await served.put("one", world.files("two"))).json()["digest"] == world.digests["two"]
    replaced = (await served.chat("one")).json()
    assert replaced["system_fingerprint"] == world.digests["two"]
    assert replaced["choices"][0]["message"]["content"] != first["choices"][0]["message"]["content"]
    assert (await served.client.delete("/control/adapters/one", headers=headers)).status_code == 200
    assert (await served.client.delete("/control/adapters/one", headers=headers)).status_code == 404
    assert (await served.chat("one")).status_code == 404
    listed = (await served.client.get("/control/adapters", headers=headers)).json()
    assert {a["name"]: a["digest"] for a in listed["adapters"]} == {n: world.digests[n] for n in ("two", "taught")}


def _truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0x10
    weights.write_bytes(content)


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")


@pytest.mark.parametrize("damage", [_truncate, _flip, _pickle, shutil.rmtree])
async def test_a_damaged_adapter_is_refused_and_the_old_one_keeps_serving(
    served: Served, world: World, damage: Callable[[Path], None]
) -> None:
    before = (await served.chat("one")).json()
    damaged = world.students / f"damaged-{damage.__name__}"
    shutil.copytree(world.students / "two", damaged)
    damage(damaged)
    response = await served.put("one", {"path": str(damaged), "digest": world.digests["two"]})
    assert (response.status_code, error(response)["code"]) == (422, "adapter_rejected")
    after = (await served.chat("one")).json()
    assert after["system_fingerprint"] == before["system_fingerprint"] == world.digests["one"]
    assert after["choices"][0]["message"] == before["choices"][0]["message"]


async def test_an_adapter_of_another_base_is_refused(served: Served, world: World) -> None:
    response = await served.put("one", world.files("foreign"))
    assert response.status_code == 422
    assert "trained on base" in error(response)["message"]
    assert served.tier.engine.adapters()["one"] == world.digests["one"]


async def test_adapters_load_only_from_the_students_folder(served: Served, world: World) -> None:
    link = world.students / "link"
    link.symlink_to(world.elsewhere)
    paths = [str(world.elsewhere), str(link), f"{world.students}/../elsewhere", "students/one", "", "/\0"]
    responses = [await served.put("one", {"path": path, "digest": world.digests["one"]}) for path in paths]
    link.unlink()
    assert [r.status_code for r in responses] == [422] * len(paths)
    assert all("inside" in error(r)["message"] for r in responses)


@pytest.mark.parametrize("name", ["base", ".hidden", "a b", "x" * 129, "@1"])
async def test_a_name_that_could_mean_something_else_is_refused(served: Served, world: World, name: str) -> None:
    response = await served.put(name, world.files("one"))
    assert (response.status_code, error(response)["param"]) == (400, "name")


async def test_control_needs_the_token(served: Served, world: World) -> None:
    wrong = await served.put("one", world.files("two"), token=TOKEN + "x")
    without = await served.client.get("/control/adapters")
    assert [wrong.status_code, without.status_code] == [401, 401]
    assert served.tier.engine.adapters()["one"] == world.digests["one"]


async def test_control_is_off_without_a_token_and_says_what_to_set(world: World) -> None:
    async with serving(world, token=None) as served:
        response = await served.put("one", world.files("one"))
    assert response.status_code == 403
    assert "TUTELAGE_TIER_TOKEN" in error(response)["message"]


async def test_a_client_that_hangs_up_stops_its_generation(served: Served) -> None:
    body = json.dumps({"model": "one", "messages": QUESTION, "max_tokens": 450, "temperature": 1.0, "seed": 1}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "root_path": "",
        "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0"},
    }  # fmt: skip
    transport = served.client._transport
    assert isinstance(transport, httpx.ASGITransport)
    await transport.app(scope, receive, send)
    assert sent[0]["status"] == 503, "no answer was generated for nobody"
    assert (await served.chat("two", max_tokens=1)).status_code == 200


async def test_a_cancelled_job_ends_at_the_next_step(served: Served) -> None:
    job = await served.tier.batcher.submit(Request(QUESTION, "one", 450, temperature=1.0, seed=1), streamed=True)
    await job.events.get()
    job.cancel()
    event = await job.events.get()
    while not isinstance(event, Completion):
        event = await job.events.get()
    assert event.finish_reason == "cancelled"
    assert event.completion_tokens < 450


async def test_an_adapter_that_cannot_answer_fails_alone(served: Served, world: World) -> None:
    """Its weights are finite and what they compute is not: nothing can be drawn from that, in whatever batch it is."""
    digest = build_tiny_adapter(world.base_dir, world.students / "overflowing", seed=4, scale=1e37)
    assert (await served.put("overflowing", {"path": str(world.students / "overflowing"), "digest": digest})).status_code == 200
    names = ["one", "overflowing", "two", "overflowing", "taught"]
    replies = await asyncio.gather(*(served.chat(name, temperature=1.0, seed=1) for name in names))
    assert [reply.status_code for reply in replies] == [200, 500, 200, 500, 200]
    for name, reply in zip(names, replies, strict=True):
        if reply.status_code == 200:
            alone = await served.chat(name, temperature=1.0, seed=1)
            assert alone.json()["choices"] == reply.json()["choices"]


async def test_a_full_queue_says_when_to_come_back(world: World) -> None:
    async with serving(world, max_batch=1, max_waiting=2) as served:
        responses = await asyncio.gather(*(served.chat(max_tokens=100) for _ in range(8)))
        statuses = [r.status_code for r in responses]
        assert statuses.count(200) >= 2
        assert set(statuses) == {200, 429}
        refused = next(r for r in responses if r.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["code"] == Overloaded.code


async def test_a_request_finishes_on_the_adapter_it_was_accepted_for(served: Served, world: World) -> None:
    before = (await served.chat("one")).json()
    long = asyncio.create_task(served.chat("base", max_tokens=450))
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(served.chat("one"))
    await asyncio.sleep(0.05)
    assert (await served.put("one", world.files("two"))).status_code == 200
    assert not long.done(), "the adapter was replaced while its request still waited"
    after = (await waiting).json()
    assert after["system_fingerprint"] == world.digests["one"]
    assert after["choices"][0]["message"] == before["choices"][0]["message"]
    assert (await long).status_code == 200
    assert (await served.chat("one")).json()["system_fingerprint"] == world.digests["two"]


async def test_closing_tells_waiting_clients_to_try_elsewhere(world: World) -> None:
    async with serving(world, max_batch=1) as served:
        requests = [asyncio.create_task(served.chat(max_tokens=400)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await served.tier.close()
        responses = await asyncio.gather(*requests)
    assert {r.status_code for r in responses} <= {200, 503}
    assert 503 in {r.status_code for r in responses}


async def test_submitting_for_an_unknown_adapter_is_refused(served: Served) -> None:
    with pytest.raises(ModelNotFound):
        await served.tier.batcher.submit(Request(QUESTION, "nobody", 5), streamed=False)


def test_every_wrong_variable_is_named_at_once() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        from_environment({"TUTELAGE_TIER_THREADS": "many", "TUTELAGE_TIER_TOKEN": "short", "TUTELAGE_TIER_MAX_BATCH": "0"})
    assert all(v in refused.value.message for v in ("TIER_THREADS", "TIER_TOKEN", "TIER_MAX_BATCH"))


def test_settings_are_read_from_the_environment(tmp_path: Path) -> None:
    roots = os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")])
    read = from_environment({"TUTELAGE_STUDENTS_DIR": roots, "TUTELAGE_TIER_MAX_BATCH": "3", "UNRELATED": "x"})
    assert read.student_roots == (tmp_path / "a", tmp_path / "b")
    assert (read.max_batch, read.token) == (3, None)


def test_bentoml_understood_every_key_of_the_services_configuration() -> None:
    """BentoML drops keys it does not know without a word."""
    from bentos.tier.service import Tier as Service

    assert Service.config["workers"] == 1
    assert Service.config["traffic"]["timeout"] == 600
    assert Service.config["logging"]["access"]["enabled"] is False


@contextmanager
def bentoml_serve(target: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """`bentoml serve` as a process group of its own; ended, and waited for, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TUTELAGE_", "BENTOML_", "PYTHONPATH"))}
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1", "TUTELAGE_TIER_THREADS": "1"}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**clean, **quiet, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, folder / "serve.log")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the tier did not become ready:\n{log.read_text()[-3000:]}")


@pytest.mark.slow
def test_bentoml_serves_the_tier_to_the_openai_client(world: World, tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(CHECKOUT),
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "TUTELAGE_BASE_DIR": str(world.base_dir),
        "TUTELAGE_STUDENTS_DIR": str(world.students),
        "TUTELAGE_TIER_TOKEN": TOKEN,
    }
    with bentoml_serve("bentos.tier.service:Tier", tmp_path, environment) as url:
        control = {"authorization": f"Bearer {TOKEN}"}
        for name in ("taught", "one"):
            loaded = httpx.put(f"{url}/control/adapters/{name}", json=world.files(name), headers=control, timeout=60)
            assert loaded.status_code == 200, loaded.text
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert {model.id for model in client.models.list()} == {"base", "taught", "one"}
        whole = client.chat.completions.create(model="taught", messages=QUESTION, max_tokens=40, logprobs=True)
        assert whole.choices[0].message.content == ANSWER
        assert whole.system_fingerprint == world.digests["taught"]
        stream = client.chat.completions.create(model="taught", messages=QUESTION, max_tokens=40, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream) == ANSWER
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.chat.completions.create(model="nobody", messages=QUESTION)
        abandoned = client.chat.completions.create(model="one", messages=QUESTION, max_tokens=450, stream=True)
        next(iter(abandoned))
        abandoned.close()
        assert client.chat.completions.create(model="one", messages=QUESTION, max_tokens=2).usage is not None
        assert httpx.get(f"{url}/livez").status_code == 200


@pytest.mark.slow
def test_a_bento_serves_its_student_on_its_own_with_the_same_answers(world: World, tmp_path: Path) -> None:
    original = Engine(world.base_dir, threads=1)
    original.load_adapter("taught", world.students / "taught", world.digests["taught"])
    [expected] = original.generate([Request(QUESTION, "taught", 40)])
    shutil.copytree(world.base_dir, tmp_path / "base")
    shutil.copytree(world.students / "taught", tmp_path / "student")
    home = {"BENTOML_HOME": str(tmp_path / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    (tmp_path / "bentoml").mkdir()
    command = [sys.executable, "-m", "bentos.tier.package", "--student-name", "Taught/v1", "--label", "run=7"]
    command += ["--adapter", str(tmp_path / "student"), "--base", str(tmp_path / "base"), "--digest", world.digests["taught"]]
    built = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    tag = json.loads(built.stdout)["tag"]
    bento = tmp_path / "bentoml" / "bentos" / tag.replace(":", "/")
    assert {path.name for path in (bento / "src").iterdir()} == {"tutelage", "inference", "bentos", "bentofile.yaml"}
    for folder in ("base", "student"):
        shutil.rmtree(tmp_path / folder)
    with bentoml_serve(tag, tmp_path, home) as url:
        body = {"model": "Taught/v1", "messages": QUESTION, "max_tokens": 40, "logprobs": True}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        [choice] = reply.json()["choices"]
        assert choice["message"]["content"] == expected.text == ANSWER
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        assert logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert reply.headers[DIGEST_HEADER] == world.digests["taught"]


@pytest.mark.slow
def test_packaging_refuses_an_adapter_that_is_not_the_evaluated_one(world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentos.tier.package", "--student-name", "one", "--adapter", str(world.students / "one")]
    command += ["--base", str(world.base_dir), "--digest", world.digests["two"]]
    home = {"BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True"}
    built = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert built.returncode == 2
    assert "expected" in built.stderr
    assert "Traceback" not in built.stderr
