"""Where state and configuration live, and the one strict loader of the YAML files under the configuration folder.

Values only: this module refuses to open connections, create folders on import or read the environment more than once a call.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import ConfigInvalid

CHECKOUT = Path(__file__).resolve().parent.parent


class Strict(BaseModel):
    """Base of every configuration record: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def whole(value: Any) -> Any:
    """For pydantic's BeforeValidator: what JSON Schema takes for an integer (3 and 3.0), not what Python does (true, "3")."""
    if isinstance(value, bool | str):
        raise ValueError("a whole number is expected")
    return value


def number(value: Any) -> Any:
    """As `whole`, of any number."""
    if isinstance(value, bool | str):
        raise ValueError("a number is expected")
    return value


SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Price(Strict):
    """List price in US dollars per million tokens."""

    input_per_mtok: float = Field(ge=0)
    output_per_mtok: float = Field(ge=0)


class ModelEntry(Strict):
    """One model behind the gateway. `recorded` answers from a JSONL of prompt and answer after `delay_seconds`, for demos and backtests
    only."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")
    tier: Literal["student", "ta", "teacher"] = "teacher"
    kind: Literal["openai", "bento", "recorded"]
    base_url: str | tuple[str, ...] | None = None  # several are replicas of one model
    model: str | None = None
    api_key_env: str | None = None
    path: str | None = None
    delay_seconds: float = Field(default=0.0, ge=0)
    price: Price | None = None
    domains: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()  # other models, asked in this order when it cannot answer
    connect_seconds: float = Field(default=5.0, gt=0)
    first_token_seconds: float = Field(default=30.0, gt=0)
    idle_seconds: float = Field(default=30.0, gt=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    max_connections: int = Field(default=1000, ge=1)

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url or ()

    @model_validator(mode="after")
    def _where(self) -> ModelEntry:
        if self.kind == "recorded" and not self.path:
            raise ValueError(f"model {self.name!r} is `recorded` and needs `path`: a JSONL file of prompt and answer")
        if self.kind != "recorded" and self.delay_seconds:
            raise ValueError(f"model {self.name!r} is `{self.kind}` and takes the time it takes; only `recorded` has delay_seconds")
        if self.kind != "recorded" and not self.base_url:
            raise ValueError(f"model {self.name!r} is `{self.kind}` and needs `base_url`, such as https://api.openai.com/v1")
        return self


class ModelsSettings(Strict):
    models: tuple[ModelEntry, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> ModelsSettings:
        names = [m.name for m in self.models]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"model names must be unique; given twice: {', '.join(twice)}")
        for model in self.models:
            unknown = sorted(set(model.fallbacks) - set(names) | {model.name} & set(model.fallbacks))
            if unknown:
                raise ValueError(f"fallbacks of {model.name!r} must be other models of this file; not so: {', '.join(unknown)}")
        return self


class GatewaySettings(Strict):
    """How the gateway holds a request. Times in seconds, sizes in bytes."""

    max_body_bytes: int = Field(default=4 * 1024 * 1024, gt=0)
    cache_ttl_seconds: int = Field(default=3600, ge=0)
    cache_deadline_seconds: float = Field(default=0.05, gt=0)
    cache_worker_bytes: int = Field(default=64 * 1024 * 1024, gt=0)
    cache_tenant_bytes: int = Field(default=64 * 1024 * 1024, gt=0)
    cache_total_bytes: int = Field(default=256 * 1024 * 1024, gt=0)
    semantic_cache: bool = True
    semantic_error_budget: float = Field(default=0.05, ge=0, le=0.5)
    semantic_shadow: float = Field(default=0.05, ge=0.005, le=1)
    semantic_questions: int = Field(default=2_000, gt=0)
    semantic_tenants: int = Field(default=64, gt=0)
    semantic_seconds: float = Field(default=1.0, gt=0)
    snapshot_seconds: float = Field(default=0.5, gt=0)
    record_flush_seconds: float = Field(default=0.0, ge=0)
    record_batch_rows: int = Field(default=200, gt=0)
    record_deadline_seconds: float = Field(default=10.0, gt=0)
    idempotency_lease_seconds: float = Field(default=15.0, gt=0)
    admission_deadline_seconds: float = Field(default=0.05, gt=0)
    slot_seconds: float = Field(default=300.0, gt=0)
    reserve_tokens: int = Field(default=1024, ge=1)
    most_running: int = Field(default=2000, ge=1)
    most_waiting: int = Field(default=2000, ge=0)
    wait_seconds: float = Field(default=10.0, gt=0)
    body_seconds: float = Field(default=10.0, gt=0)
    send_seconds: float = Field(default=10.0, gt=0)
    drain_seconds: float = Field(default=20.0, ge=0)
    configuration_seconds: float = Field(default=1.0, gt=0)
    gauge_seconds: float = Field(default=1.0, gt=0)
    storage_seconds: float = Field(default=5.0, gt=0)
    estimates_seconds: float = Field(default=5.0, gt=0)
    heads_seconds: float = Field(default=60.0, gt=0)
    sweep_seconds: float = Field(default=600.0, gt=0)
    bare: bool = False  # for measuring only: nothing is limited, cached or recorded


class JudgeSettings(Strict):
    """`model`: the configured model that compares two answers, of another `family` (its maker) than the teachers, `teacher_families`.
    `sensitivity` and `specificity`: how often it is right about good and bad answers, as audited against people."""

    model: str
    family: str = Field(min_length=1)
    teacher_families: tuple[str, ...] = Field(min_length=1)
    sensitivity: float = Field(default=1.0, gt=0, le=1)
    specificity: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _another_family(self) -> JudgeSettings:
        if self.family.casefold() in {family.casefold() for family in self.teacher_families}:
            raise ValueError(
                f"judge {self.model!r} is of the teacher's own family {self.family!r} and would favour it; name one of another"
            )
        if self.sensitivity + self.specificity <= 1:
            raise ValueError("a judge whose sensitivity and specificity sum up to 1 or less tells nothing; audit it or take another")
        return self


class JudgedBySettings(JudgeSettings):
    """A judge for a stage that runs by itself: an OpenAI-compatible endpoint, `base_url` up to /v1; its key is in `api_key_env`."""

    base_url: str
    api_key_env: str | None = None
    timeout_seconds: float = Field(default=60.0, gt=0)


class VerifierSettings(Strict):
    """`kind` of comparison. `tolerance`: relative error allowed of a number. `code_seconds`, `code_megabytes`: limits of a code test."""

    kind: Literal["exact", "normalised", "numeric", "json_schema", "reasoning_gym", "code"] = "normalised"
    tolerance: float = Field(default=1e-6, ge=0)
    code_seconds: float = Field(default=5.0, gt=0)
    code_megabytes: int = Field(default=512, ge=32)


class RoutingSettings(Strict):
    """`threshold`: calibrated probability of being right from which a student's answer is served; `similarity`: to what is known, from
    which `direct` trusts estimates. Shares are of requests; costs are micro-dollars. `tune`: whether cycles
    move both within `promised_loss`, the loss against the teacher alone. `recall`: whether models cheaper than the teacher
    answer requests of domains of knowledge with earlier answers in context: the nearest, from `recall_similarity` on, of the newest
    `recall_answers`, read again every `recall_seconds`. `verifiers`: by domain, where a program tells whether an answer is right."""

    threshold: float = Field(default=0.85, gt=0, le=1)
    similarity: float = Field(default=0.6, ge=0, le=1)
    promised_loss: float = Field(default=0.03, gt=0, lt=1)
    tune: bool = True
    max_student_tokens: int = Field(default=64, gt=0)
    explore: float = Field(default=0.03, ge=0, le=0.05)
    explore_floor: float = Field(default=0.7, gt=0, le=1)
    shadow: float = Field(default=0.1, ge=0, le=1)
    shadow_challenger: float = Field(default=0.5, ge=0, le=1)
    shadows_at_once: int = Field(default=4, ge=1)
    most_parallel: int = Field(default=3, ge=2, le=8)
    answer_tokens: int = Field(default=256, ge=1)
    student_microusd: int = Field(default=25, ge=0)
    outcome_window: int = Field(default=400, ge=20)
    recall: bool = True
    recall_similarity: float = Field(default=0.6, ge=0, le=1)
    recall_answers: int = Field(default=2_000, ge=1)
    recall_seconds: float = Field(default=30.0, gt=0)
    judge: JudgeSettings | None = None
    verifiers: dict[str, VerifierSettings] = Field(default_factory=dict)


class TierSettings(Strict):
    """The local tier service: one base, many adapters. `threads` 0 means all cores."""

    port: int = Field(default=3300, ge=0, le=65535)
    threads: int = Field(default=0, ge=0)
    max_batch: int = Field(default=16, ge=1)
    core_hour_usd: float = Field(default=0.04, ge=0)
    timeout_seconds: float = Field(default=60.0, gt=0)


def load(kind: type[SettingsT], config_dir: Path) -> SettingsT:
    """The settings of one module from its YAML (`GatewaySettings` reads `gateway.yaml`); defaults when there is no file.

    Raises:
        ConfigInvalid: the file is not YAML, or any key in it is unknown or has a wrong value; all faults are listed.
    """
    path = config_dir / f"{kind.__name__.removesuffix('Settings').lower()}.yaml"
    if not path.exists():
        return kind()
    try:
        values: Any = yaml.safe_load(path.read_text()) or {}
        return kind.model_validate(values)
    except yaml.YAMLError as broken:
        raise ConfigInvalid(f"{path} is not valid YAML: {broken}") from broken
    except ValidationError as broken:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {e['input']!r:.80})" for e in broken.errors())
        raise ConfigInvalid(f"{path}: {faults}") from broken


@dataclass(frozen=True)
class Home:
    """The folder that holds all state of one installation (`TUTELAGE_HOME`)."""

    root: Path

    @classmethod
    def from_environment(cls, explicit: str | None = None) -> Home:
        """`explicit`, else `TUTELAGE_HOME`, else `.tutelage` under the current folder; created when missing."""
        root = Path(explicit or os.environ.get("TUTELAGE_HOME") or ".tutelage").expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        return cls(root)

    def folder(self, name: str) -> Path:
        """A folder under home, created when missing."""
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def students(self) -> Path:
        return self.folder("students")

    @property
    def models(self) -> Path:
        return self.folder("models")

    @property
    def logs(self) -> Path:
        return self.folder("logs")

    @property
    def run(self) -> Path:
        return self.folder("run")

    def secret(self, name: str) -> str:
        """A random secret of this installation, made once and readable by its owner only; `TUTELAGE_<NAME>` wins."""
        given = os.environ.get(f"TUTELAGE_{name.upper()}")
        if given:
            return given
        path = self.folder("secrets") / name
        if not path.exists():
            descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            # link, not rename: the first of two processes wins and both read the same secret
            try:
                os.link(path.with_suffix(".new"), path)
            except FileExistsError:
                pass
            finally:
                path.with_suffix(".new").unlink(missing_ok=True)
        return path.read_text().strip()

    def config_dir(self, explicit: str | None = None) -> Path:
        """`explicit`, else `TUTELAGE_CONFIG`, else this home's own `config/` (a demo leaves one), else the checkout's `configs/`."""
        for candidate in (explicit, os.environ.get("TUTELAGE_CONFIG")):
            if candidate:
                path = Path(candidate).expanduser().resolve()
                if not path.is_dir():
                    raise ConfigInvalid(f"the configuration folder {path} does not exist; give a folder that holds models.yaml")
                return path
        own = self.root / "config"
        return own if own.is_dir() else CHECKOUT / "configs"

    def environment(self) -> dict[str, str]:
        """What Prefect, MLflow, BentoML and DVC must see to share this home; telemetry off, no model hub."""
        return {
            "TUTELAGE_HOME": str(self.root),
            "PREFECT_HOME": str(self.folder("prefect")),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder('mlflow') / 'mlflow.db'}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "BENTOML_HOME": str(self.folder("bentoml")),
            "BENTOML_DO_NOT_TRACK": "True",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(self.folder("dvc")),
            "ITERATIVE_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "true",
            "HF_HUB_OFFLINE": "1",
        }
