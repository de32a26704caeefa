"""The one error tree. Each class knows its HTTP status and its OpenAI error `type` and `code`.

To add one: subclass `TutelageError`, set `status`, `type` and `code`, and write the message so that it says what was wrong,
what is allowed and what to do next. It refuses to know where an error is shown: the gateway and the command line decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TutelageError(Exception):
    """Base of every error a user may see; `message` is safe to show."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}


class InvalidRequest(TutelageError, ValueError):
    """The request cannot be understood or asks for what does not exist here."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"


class BodyBrokenOff(InvalidRequest):
    """The client left, or what it sends is no body in HTTP's terms."""

    code = "body_incomplete"


class RequestTimeout(InvalidRequest):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class Unauthenticated(TutelageError):
    """No key, a malformed key, an unknown, expired or revoked key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(TutelageError):
    """The key is known and may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(TutelageError, LookupError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(InvalidRequest):
    """What is there already stands against it."""

    status = 409
    code = "conflict"


class PlanLimitReached(Conflict):
    """The tenant has as many of something as its plan, or what was agreed, allows."""

    code = "plan_limit_reached"


class CycleRunning(Conflict):
    """Another process runs an evolution cycle of this tenant."""

    code = "cycle_running"


class CycleFailed(TutelageError):
    """An evolution cycle ended with an error; the message carries its last lines."""

    code = "cycle_failed"


class IdempotencyConflict(InvalidRequest):
    """A request with the same Idempotency-Key is being answered now."""

    status = 409
    code = "idempotency_key_in_use"


class IdempotencyMismatch(InvalidRequest):
    """An Idempotency-Key was sent again with another request."""

    status = 422
    code = "idempotency_key_reused"


class Suspended(Forbidden):
    """The tenant was suspended; its keys are in order but open nothing."""

    code = "tenant_suspended"


class LimitReached(TutelageError):
    """A limit of the tenant or of the key forbids the request now; `code` says which."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, code: str, retry_after: int) -> None:
        super().__init__(message, retry_after=retry_after)
        self.code = code


class Unavailable(TutelageError):
    """Nothing that may answer can answer now; trying again later can help."""

    status = 503
    type = "service_unavailable_error"
    code = "unavailable"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = 5) -> None:
        super().__init__(message, param=param, retry_after=retry_after)


class Overloaded(Unavailable):
    """More requests than the gateway may run, and no turn for this one in time."""

    code = "overloaded"


class BackendFailed(Unavailable):
    """One model behind the gateway failed; the pipeline turns it into a fallback or a 503."""

    code = "upstream_unavailable"


class BackendErred(BackendFailed):
    """It was reached and failed at this very request: the fault is the model's own, not of the server that others stand on too."""


class Draining(BackendFailed):
    """The worker stops before an answer is whole; the same request can be sent again at once."""

    code = "server_draining"


class BackendRefused(TutelageError):
    """A model behind the gateway answered 4xx: the client's request is at fault, another try gives the same."""

    status = 400
    type = "invalid_request_error"
    code = "upstream_rejected"

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status


class ConfigInvalid(TutelageError, ValueError):
    """A file under the configuration folder does not parse; every fault in it is listed at once."""

    code = "config_invalid"


class PromotionConflict(TutelageError):
    """Somebody else moved the champion pointer since it was read; read again and decide again."""

    status = 409
    code = "promotion_conflict"


class EngineFailed(TutelageError):
    """An embedded server (PostgreSQL, Valkey, a tier) did not start or did not become ready."""

    status = 503
    code = "engine_failed"


class AdapterRejected(TutelageError, ValueError):
    """An adapter file that may not be loaded: wrong digest, foreign base, unsafe format, not finite."""

    status = 422
    type = "invalid_request_error"
    code = "adapter_rejected"


class TrafficUnreadable(TutelageError, ValueError):
    """A row of a traffic or data file cannot be read; the message names file, line and what is expected."""

    status = 400
    type = "invalid_request_error"
    code = "traffic_unreadable"


class AuditBroken(TutelageError):
    """An audit chain, a signed head or the ledger is not what was written."""

    code = "audit_broken"


def told(body: dict[str, Any], *, status: int, retry_after: str | None = None) -> TutelageError:
    """The error that a reply tells of: `body` is its OpenAI error object."""
    wrong, wait = body["error"], int(retry_after) if retry_after else None
    if status == LimitReached.status:
        return LimitReached(wrong["message"], code=wrong["code"], retry_after=wait or 1)
    kind = next((kind for kind in _tree(TutelageError) if kind.code == wrong["code"]), TutelageError)
    error = kind(wrong["message"], param=wrong.get("param"))
    error.status, error.retry_after = status, wait
    return error


def _tree(root: type[TutelageError]) -> Iterator[type[TutelageError]]:
    yield root
    for branch in root.__subclasses__():
        yield from _tree(branch)
