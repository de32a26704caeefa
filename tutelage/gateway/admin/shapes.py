"""What is sent to and answered by /admin/v1, as pydantic records: unknown fields are refused, and /openapi.json tells them.

It refuses to know where a value comes from.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field

from tutelage.gateway.limits import Agreement, Limits
from tutelage.gateway.roles import Role
from tutelage.gateway.tenancy import NAME
from tutelage.records import Bodies, Strategy
from tutelage.settings import Strict, number, whole

MOST_ROWS = 1_000
MOST_OVERLAP = 30 * 86_400


def _near(at: datetime) -> datetime:
    """Times of a century: beyond it lie typing errors, and what no time zone can turn."""
    if not 2000 <= at.year <= 2100:
        raise ValueError("a time between the years 2000 and 2100 is expected")
    return at.astimezone(UTC)


DAY = r"2(0\d\d|100)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
TIME = rf"{DAY}T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{{1,6}})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
Time = Annotated[AwareDatetime, AfterValidator(_near), Field(json_schema_extra={"pattern": f"^{TIME}$"})]
Day = Annotated[date, Field(ge=date(2000, 1, 1), le=date(2100, 12, 31), json_schema_extra={"pattern": f"^{DAY}$"})]
Text = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]+$")]
ModelName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")]
Route = Literal["chat", "embeddings", "feedback", "models"]
Tier = Literal["free", "pro", "enterprise"]
OnDisconnect = Literal["cancel", "drain"]
Retention = Annotated[int, Field(ge=1, le=36_500), BeforeValidator(whole)]
Seconds = Annotated[int, Field(ge=0, le=31_536_000), BeforeValidator(whole)]
Overlap = Annotated[int, Field(ge=0, le=MOST_OVERLAP), BeforeValidator(whole)]
ErrorBudget = Annotated[float, Field(ge=0, le=0.5), BeforeValidator(number)]
PolicyVersion = Annotated[int, Field(ge=0, le=10**9), BeforeValidator(whole)]
MaxCost = Annotated[int, Field(ge=1, le=10**15), BeforeValidator(whole)]
Share = Annotated[float, Field(gt=0, le=1)]
LeastQuality = Annotated[float, Field(gt=0, le=1), BeforeValidator(number)]
Training = Literal["on", "off"]  # whether students may learn from its traffic


# --- requests ----------------------------------------------------------------------------------------------------


class NewTenant(Strict):
    """`limits`: what was agreed beside the tier's plan; null there lifts a limit."""

    name: str = Field(pattern=f"^{NAME}$")
    tier: Tier = "free"
    limits: Agreement = Agreement()
    on_disconnect: OnDisconnect = "cancel"
    bodies: Bodies = "full"
    retention_days: Retention | None = None
    cache_seconds: Seconds | None = None
    semantic_error_budget: ErrorBudget | None = None
    strategy: Strategy = "quality"
    max_cost_microusd: MaxCost | None = None
    min_confidence: LeastQuality | None = None
    training: Training = "on"


class TenantChange(Strict):
    """Only what is sent changes. `limits` stand beside those agreed before; null there lifts a limit. `retention_days` null: for ever;
    `cache_seconds` null: as long as the gateway says. `semantic_error_budget`: the share of answers given to paraphrases that may
    be wrong; 0: none are given, null: as much as the gateway says.
    `max_cost_microusd`, of one answer, null: whatever it costs. `min_confidence`: the least quality that its answers are promised,
    null: none is stated.
    Operators alone change `tier` and `limits`."""

    tier: Tier | None = None
    limits: Agreement | None = None
    on_disconnect: OnDisconnect | None = None
    bodies: Bodies | None = None
    retention_days: Retention | None = None
    cache_seconds: Seconds | None = None
    semantic_error_budget: ErrorBudget | None = None
    strategy: Strategy | None = None
    max_cost_microusd: MaxCost | None = None
    min_confidence: LeastQuality | None = None
    training: Training | None = None


class NewKey(Strict):
    """What is left out is as much as the key that makes it has. `role`: it may administer its tenant. `routes` []: only that."""

    role: Role | None = None
    models: Annotated[list[ModelName], Field(max_length=200)] | None = None
    routes: Annotated[list[Route], Field(max_length=4)] | None = None
    limits: Limits = Limits()
    expires_at: Time | None = None


class NewOperator(Strict):
    role: Role
    expires_at: Time | None = None


class Rotation(Strict):
    """For so many seconds both keys open."""

    overlap_seconds: Overlap = 3600


class Erasure(Strict):
    """Of one request, of all before a time, or with neither of everything."""

    request_id: Text | None = None
    before: Time | None = None


class Reversion(Strict):
    """`version` 0: as configured. `expected`: the version that is believed to hold; another one is a conflict."""

    version: PolicyVersion
    reason: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]+$")]
    expected: PolicyVersion | None = None


class Nothing(Strict):
    """No body is needed."""


class Page(Strict):
    """`after`: the id of the last row of the page before."""

    limit: int = Field(default=100, ge=1, le=MOST_ROWS)
    after: Text | None = None


class GapsQuery(Strict):
    tenant: Text | None = None


class UsageQuery(Strict):
    """`by`: what to group by, parted by commas. Days are UTC; both belong to it. A CSV has all rows, whatever `limit` and `offset` say."""

    by: str = Field(
        default="tenant,key,model,domain,day", pattern=r"^((tenant|key|model|domain|day)(,(tenant|key|model|domain|day)){0,4})?$"
    )
    tenant: Text | None = None
    key: Text | None = None
    model: Text | None = None
    domain: Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")] | None = None
    first_day: Day | None = None
    last_day: Day | None = None
    format: Literal["json", "csv"] = "json"
    limit: int = Field(default=100, ge=1, le=MOST_ROWS)
    offset: int = Field(default=0, ge=0, le=10_000_000)


class BillingQuery(Strict):
    month: str | None = Field(default=None, pattern=r"^20\d\d-(0[1-9]|1[0-2])$", description="UTC, such as 2026-11; default: this one")
    tenant: Text | None = None
    format: Literal["json", "csv"] = "json"


class AuditQuery(Strict):
    """`tenant`: whose chain; an operator who names none reads the installation's own. `before`: a sequence, for the next page."""

    tenant: Text | None = None
    limit: int = Field(default=100, ge=1, le=MOST_ROWS)
    before: int | None = Field(default=None, ge=1, le=2**62)


class ChainQuery(Strict):
    """`tenant`: whose chain; an operator who names none means all."""

    tenant: Text | None = None


# --- answers -----------------------------------------------------------------------------------------------------


class Held(BaseModel):
    used: int
    limit: int | None


class Tenant(BaseModel):
    """`limits`: those that hold, plan and agreement together."""

    id: str
    name: str
    tier: Tier
    status: Literal["active", "suspended", "deleted"]
    limits: Limits
    models: Held
    storage_bytes: Held
    features: list[str]
    on_disconnect: OnDisconnect
    bodies: Bodies
    retention_days: int | None
    cache_seconds: int | None
    semantic_error_budget: float | None
    strategy: Strategy
    max_cost_microusd: int | None
    min_confidence: float | None
    training: Training


class PolicySettings(Strict):
    """What a version sets; the rest is as configured."""

    threshold: Share | None = None
    similarity: Annotated[float, Field(ge=0, le=1)] | None = None


class Policy(BaseModel):
    """`evidence`: the figures that a change was made on. `reverts_to`: the version whose settings it took up again; 0: none at all."""

    tenant_id: str
    version: int
    created_at: datetime
    actor: str
    reason: str
    settings: PolicySettings
    evidence: dict[str, Any]
    reverts_to: int | None


class Policies(BaseModel):
    """Newest first; the first one holds. None: the tenant is routed as configured, version 0."""

    object: Literal["list"] = "list"
    data: list[Policy]
    has_more: Literal[False] = False


class Key(BaseModel):
    id: str
    tenant_id: str | None
    role: Role | None
    models: list[str] | None
    routes: list[str] | None
    limits: Limits
    expires_at: datetime | None
    revoked_at: datetime | None
    status: Literal["live", "expired", "revoked"]


class MadeKey(Key):
    """`key` is shown this once."""

    key: str


class MadeTenant(BaseModel):
    tenant_id: str
    key_id: str
    key: str
    tenant: Tenant


class RotatedKey(BaseModel):
    new: MadeKey
    old: Key


class DeletedTenant(BaseModel):
    id: str
    deleted: Literal[True] = True
    interactions_erased: int


class Erased(BaseModel):
    interactions_erased: int


class Tenants(BaseModel):
    object: Literal["list"] = "list"
    data: list[Tenant]
    has_more: bool


class Keys(BaseModel):
    object: Literal["list"] = "list"
    data: list[Key]
    has_more: bool


class UsageRow(BaseModel):
    """Of what it was not grouped by nothing is told."""

    tenant_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    domain: str | None = None
    day: str | None = None
    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost_microusd: int


class Usage(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageRow]
    has_more: bool


class Gap(BaseModel):
    """A domain (null: requests that fit none yet). Rates have 95 % Wilson bounds; costs are micro-dollars, `priority` those that a
    core-second of training is expected to save a day; `decision`: what a cycle would do now."""

    tenant_id: str
    domain: str | None
    requests: int
    per_day: float
    failure_rate: float
    failure_95: tuple[float, float]
    escalation_rate: float
    escalation_95: tuple[float, float]
    cost_microusd: int
    cost_per_day_microusd: float
    learnability: float
    kind: Literal["skill", "knowledge"]
    training_seconds: float
    priority: float
    decision: Literal["train", "propose", "retrieve", "wait"]
    reason: str


class Gaps(BaseModel):
    object: Literal["list"] = "list"
    data: list[Gap]
    has_more: Literal[False] = False


class Bill(BaseModel):
    """`estimated`: requests whose provider told no usage; `lost`: billed at what they had reserved, because their worker died."""

    month: str
    tenant_id: str
    name: str
    tier: str
    status: str
    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    estimated: int
    lost: int
    cost_microusd: int
    cost_usd: str
    spend_limit_microusd: int | None


class Bills(BaseModel):
    object: Literal["list"] = "list"
    data: list[Bill]
    has_more: Literal[False] = False


class Replica(BaseModel):
    model: str
    url: str
    state: Literal["closed", "open", "half-open", "resting"]
    in_flight: int
    failures: int
    ejections: int
    retry_in_seconds: float
    last_error: str | None


class Backend(BaseModel):
    """`available`: at least one replica may be called now. A `recorded` model has no replicas."""

    name: str
    tier: Literal["student", "ta", "teacher", "local"]
    kind: Literal["openai", "bento", "recorded"]
    available: bool
    domains: list[str]
    fallbacks: list[str]
    replicas: list[Replica]


class Backends(BaseModel):
    """As the worker that answers sees them: each worker has breakers of its own; /metrics sums them up."""

    object: Literal["list"] = "list"
    worker: int
    data: list[Backend]
    has_more: Literal[False] = False


class Config(BaseModel):
    """`fault`: why the files as they are now are not used, and `version` stays."""

    version: str
    loaded_at: datetime
    fault: str | None
    tutelage: str
    gateway: dict[str, Any]
    routing: dict[str, Any]
    models: list[str]


class Link(BaseModel):
    """One row of an audit chain; `hash` covers it and the one before it."""

    tenant_id: str
    sequence: int
    at: str
    kind: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    hash: str


class Links(BaseModel):
    object: Literal["list"] = "list"
    data: list[Link]
    has_more: bool


class Verified(BaseModel):
    """`broken`: the first thing found wrong."""

    class Break(BaseModel):
        tenant_id: str
        sequence: int | None
        reason: str

    whole: bool
    links: int
    broken: Break | None


class Head(BaseModel):
    """`signature`: Ed25519 over the other fields as JSON with sorted keys and no spaces, in base64."""

    tenant_id: str
    sequence: int
    hash: str
    at: str
    signature: str


class Heads(BaseModel):
    """`public_key`: Ed25519, in base64."""

    object: Literal["list"] = "list"
    public_key: str
    data: list[Head]
    has_more: Literal[False] = False
