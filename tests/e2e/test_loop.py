"""The whole loop on a tiny random model: traffic over HTTP, gaps, students, gate, MLflow, Bento, rollout, restart."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml
from fakes import build_tiny_base

from tutelage.settings import CHECKOUT, Home

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SIGNALS = {"red": "stop", "green": "go", "amber": "wait"}
PLACES = ["harbour", "station", "bridge", "market", "school", "museum", "garden", "tower", "castle", "square", "river", "church"]


@dataclass
class System:
    """One installation on free ports, driven by its own commands."""

    home: Home
    config: Path
    port: int

    def command(self, *arguments: str) -> str:
        done = subprocess.run(self.line(*arguments), capture_output=True, text=True, cwd=CHECKOUT, timeout=600, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def line(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tutelage.cli", *arguments, "--home", str(self.home.root)]

    def serve(self) -> subprocess.Popen[bytes]:
        log = (self.home.logs / "serve.log").open("ab")
        line = self.line("serve", "--port", str(self.port), "--config", str(self.config))
        process = subprocess.Popen(line, cwd=CHECKOUT, stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while not self._ready():
            assert process.poll() is None, (self.home.logs / "serve.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "serve did not become ready"
            time.sleep(0.3)
        return process

    def _ready(self) -> bool:
        tier = yaml.safe_load((self.config / "tier.yaml").read_text())["port"]
        try:
            return all(
                httpx.get(url, timeout=2).status_code == 200 for url in (f"{self.url}/health/ready", f"http://127.0.0.1:{tier}/readyz")
            )
        except httpx.HTTPError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def light(rng: random.Random) -> tuple[str, str]:
    colour = rng.choice(sorted(SIGNALS))
    return f"The light at the {rng.choice(PLACES)} number {rng.randrange(10_000)} shows {colour}. What do you do?", SIGNALS[colour]


def noise(rng: random.Random) -> tuple[str, str]:
    return f"Guess the secret of ticket {rng.randrange(10**9)} please", str(rng.randrange(10**6))


def port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def traffic() -> list[tuple[str, str]]:
    rng = random.Random(3)
    rows = [make(rng) for _ in range(260) for make in (light, noise)]
    return list(dict(rows).items())


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, encoder: Path, traffic: list[tuple[str, str]]) -> Iterator[System]:
    """A home whose base is tiny and random, with short trainings, and a recording as the teacher."""
    home = Home(tmp_path_factory.mktemp("loop"))
    build_tiny_base(home.models / "smollm2-135m-instruct")
    (home.models / "encoder").symlink_to(encoder)
    config = home.folder("config")
    for source in (CHECKOUT / "configs").glob("*.yaml"):
        values = yaml.safe_load(source.read_text()) | OVERRIDES.get(source.stem, {})
        (config / source.name).write_text(yaml.safe_dump(values))
    recording = home.root / "recording.jsonl"
    recording.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in traffic))
    price = {"input_per_mtok": 2.5, "output_per_mtok": 10.0}
    teacher = {"name": "recorded-teacher", "kind": "recorded", "path": str(recording), "price": price}
    (config / "models.yaml").write_text(yaml.safe_dump({"models": [teacher]}))
    (config / "tier.yaml").write_text(yaml.safe_dump({"port": port()}))
    made = System(home, config, port())
    yield made
    made.command("stop")


OVERRIDES = {
    "finetune": {"budget_tokens": 60_000, "probe_tokens": 12_000, "learning_rate": 0.01, "max_epochs": 12},
    "evolve": {"min_requests": 80, "evolution_interval": None, "schedule_hours": None},  # the test begins each cycle itself
    "routing": {"explore": 0.0, "shadow": 0.0},  # nothing is left to chance
}


def test_the_loop_closes_and_survives(system: System, traffic: list[tuple[str, str]]) -> None:
    serving = system.serve()
    key = json.loads(system.command("tenants", "create", "acme", "--tier", "pro", "--json"))["key"]
    client = openai.OpenAI(api_key=key, base_url=f"{system.url}/v1", max_retries=3)
    wait_for_key(client)

    unseen, seen = traffic[:40], traffic[40:]
    acknowledged = [send(client, prompt, answer) for prompt, answer in seen]
    assert {a["tier"] for a in acknowledged} == {"teacher"}

    system.command("evolve", "--once", "--config", str(system.config))
    status = json.loads(system.command("status", "--json"))
    versions = {v["status"]: v for v in status["students"]}
    assert set(versions) == {"ta", "refused"}, status["students"]
    assert "held-out items right" in versions["refused"]["reason"], "a refusal says what was measured"
    assert "majority" in versions["refused"]["reason"]
    assert versions["ta"]["mlflow_version"] == versions["refused"]["mlflow_version"] == "1"
    assert versions["ta"]["bento"].startswith(versions["ta"]["student"])
    check_registry(system, versions)

    served = [send(client, p, a) for p, a in unseen if p.startswith("The light")]
    by_student = [s for s in served if s["tier"] == "ta"]
    assert len(by_student) >= len(served) / 2
    assert sum(s["right"] for s in by_student) >= 0.85 * len(by_student)
    assert all(s["tier"] == "teacher" for s in (send(client, p, a) for p, a in unseen if p.startswith("Guess")))

    # a second cycle on the same traffic has nothing new to learn
    system.command("evolve", "--once", "--config", str(system.config))
    assert len(json.loads(system.command("students", "--json"))) == 2

    kill_everything(system, serving)
    serving = system.serve()
    recorded = int(sum(row["requests"] for row in json.loads(system.command("usage", "--json"))))
    assert recorded >= len(acknowledged) + len(unseen), "an acknowledged answer was lost"
    again = [send(client, p, a, cache="bypass") for p, a in unseen if p.startswith("The light")]
    assert sum(s["tier"] == "ta" for s in again) == len(by_student), "the promoted student keeps serving after a crash"

    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 130
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(system.home.root) in " ".join(p.info["cmdline"] or [])]


def wait_for_key(client: openai.OpenAI) -> None:
    for _ in range(100):
        try:
            client.models.list()
            return
        except openai.AuthenticationError:
            time.sleep(0.1)
    raise AssertionError("the new key never became known")


def send(client: openai.OpenAI, prompt: str, answer: str, *, cache: str = "") -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    raw = client.chat.completions.with_raw_response.create(
        model="auto",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        extra_headers={"x-tutelage-cache": cache} if cache else {},
    )
    said = raw.parse().choices[0].message.content
    return {"tier": raw.headers["x-tutelage-tier"], "right": said == answer, "id": raw.headers["x-request-id"]}


def check_registry(system: System, versions: dict[str, dict[str, str]]) -> None:
    """What a reviewer sees in MLflow: both versions, the promoted one under its alias once the desk has looked, each with its reason."""
    script = (
        "import sys, time, mlflow; c = mlflow.MlflowClient(); until = time.monotonic() + 60\n"
        "while not c.get_registered_model(sys.argv[1]).aliases and time.monotonic() < until: time.sleep(0.5)\n"
        "for name in sys.argv[1:]:\n"
        "    m = c.get_registered_model(name); v = c.get_model_version(name, '1')\n"
        "    print(name, {a: str(n) for a, n in m.aliases.items()}, v.tags['gate'], '|', v.description.replace(chr(10), ' '))\n"
    )
    names = [versions["ta"]["student"], versions["refused"]["student"]]
    environment = {**os.environ, **system.home.environment()}
    told = subprocess.run([sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True, check=True).stdout
    promoted, refused = told.splitlines()
    assert "'champion': '1'" in promoted
    assert "refuse" in refused
    assert "held-out items right" in refused


def kill_everything(system: System, serving: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process of the installation at once, as a power cut would end them."""
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(system.home.root) in " ".join(p.info["cmdline"] or [])]
    for fact in system.home.run.glob("*.json"):
        pid = json.loads(fact.read_text())["pid"]
        if psutil.pid_exists(pid):
            mine += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in {p.pid: p for p in mine}.values():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    serving.wait(10)
