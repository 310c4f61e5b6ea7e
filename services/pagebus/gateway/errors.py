"""What goes wrong with a request, in OpenAI's error shape; the one table from our codes to HTTP statuses.

It knows statuses and JSON, not how they are sent.
"""

import re
from collections.abc import Mapping

import msgspec

from pagebus.requester.events import RequestFailed

_MAX_MESSAGE_CHARS = 1000
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")
_KEY = re.compile(r"\[\.\.\.\]")

_STATUS_OF_CODE: Mapping[str, int] = {
    "queue_full": 429,
    "timeout": 504,
    "deadline_exceeded": 504,
    "no_leader": 503,
    "no_executor": 503,
    "not_ready": 503,
    "server_shutting_down": 503,
    "tokenizer_busy": 503,
    "prompt_too_large": 413,
    "stream_expired": 404,
    "cancelled": 499,
}
_TYPE_OF_STATUS: Mapping[int, str] = {
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_DEFAULT_RETRY_AFTER_S = 1.0


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The inner object of OpenAI's error shape; `code` is a string or null, never a number."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """OpenAI's error shape."""

    error: ErrorBody


class ApiError(Exception):
    """Ends one request with an HTTP status and an error body. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorBody:
        """The error's body; long messages are cut."""
        return ErrorBody(
            message=str(self)[:_MAX_MESSAGE_CHARS].encode(errors="replace").decode(),
            type=error_type(self.status),
            param=self.param,
            code=self.code,
        )

    def encode(self) -> bytes:
        """`{"error": {...}}` as JSON."""
        return msgspec.json.encode(ErrorResponse(self.body))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """`retry-after` (whole seconds, at least 1) where waiting helps."""
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(max(1, round(self.retry_after_s))).encode())]


def error_type(status: int) -> str:
    """OpenAI's error type for a status."""
    return _TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, message, param=param, code=code or "invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    """A 400 for a parameter that is known but not served."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def from_failure(failure: RequestFailed) -> ApiError:
    """The HTTP face of a request that the scheduler refused, or that failed."""
    status = _STATUS_OF_CODE.get(failure.code)
    if status is None:
        status = 400 if failure.is_client_fault else 500
    retry_after_s = failure.retry_after_s
    if retry_after_s is None and status in (429, 503):
        retry_after_s = _DEFAULT_RETRY_AFTER_S
    return ApiError(status, failure.message, code=failure.code, retry_after_s=retry_after_s)


def from_decode_error(error: Exception) -> ApiError:
    """A 400 for a body that could not be decoded; names the parameter where msgspec names a path."""
    if isinstance(error, msgspec.ValidationError):
        message = str(error)
        path = ""
        if found := _PATH.search(message):
            path = _KEY.sub("", found["path"])
            message = message[: found.start()]
        if missing := _MISSING.search(message):
            name = f"{path}.{missing['name']}" if path else missing["name"]
            return ApiError(400, f"{name} is required", param=name, code="missing_required_parameter")
        return invalid(f"{path or 'the body'}: {message}", path or None, "invalid_type")
    if isinstance(error, RecursionError):
        return invalid("the body is nested too deeply", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return invalid(f"the body is not UTF-8 (byte {error.start})", code="invalid_json")
    return invalid(f"the body is not valid JSON: {error}", code="invalid_json")
