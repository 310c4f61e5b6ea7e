"""From a request's bytes and headers to a typed request: what both POST routes do before they tokenize."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import msgspec

from pagebus.bus.messages import Sampling
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.errors import ApiError, from_decode_error, invalid
from pagebus.gateway.generation_events import GenerationRequest
from pagebus.gateway.jobs import Idempotency
from pagebus.gateway.limits import ClientGoneError, Receive, Scope, read_body
from pagebus.gateway.openai_types import CommonRequest
from pagebus.gateway.request_ids import new_request_id
from pagebus.gateway.sampling_params import check_ids
from pagebus.gateway.text_errors import TextError, TokenizerBusyError
from pagebus.gateway.tracing import HttpTrace, RequestTrace

_Request = TypeVar("_Request", bound=CommonRequest)
_CLIENT_GONE_STATUS = 499  # never sent; what logs and traces call it
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_TRACE_HEADERS = frozenset({b"traceparent", b"tracestate"})


async def read_request(
    context: GatewayContext, scope: Scope, receive: Receive, decoder: msgspec.json.Decoder[_Request]
) -> tuple[_Request, Idempotency | None]:
    """The decoded body, and the key that came with it; raises `ApiError` for everything that is wrong."""
    body = await read_body(scope, receive, context.max_body_bytes)
    try:
        return decoder.decode(body), _idempotency(scope, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise from_decode_error(error) from None


def _idempotency(scope: Scope, body: bytes) -> Idempotency | None:
    keys = [value for name, value in scope["headers"] if name == b"idempotency-key"]
    if not keys:
        return None
    key = keys[0].decode("latin-1").strip()
    if len(keys) > 1 or not _IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid(
            "send one Idempotency-Key of 1 to 255 printable ASCII characters",
            "Idempotency-Key",
            "invalid_key",
        )
    digest = hashlib.sha256(b"%b\0%b" % (str(scope["path"]).encode(), body)).digest()
    return Idempotency(key, digest)


@contextlib.contextmanager
def traced(
    context: GatewayContext, scope: Scope, request: CommonRequest, model: str
) -> Iterator[RequestTrace]:
    """The request's trace, a child of the client's W3C context; ends with the block, and knows the status."""
    headers: Mapping[str, str] = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in _TRACE_HEADERS
    }
    route = str(scope["path"])
    inner = context.telemetry.start_request(
        f"POST {route}",
        headers,
        {
            "http.request.method": "POST",
            "http.route": route,
            "url.path": route,
            "gen_ai.operation.name": "chat" if route.startswith("/v1/chat/") else "text_completion",
            "gen_ai.provider.name": "pagebus",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": request.num_choices,
            "gen_ai.request.stream": bool(request.stream),
        },
    )
    trace, status = HttpTrace(inner), 200
    try:
        yield trace
    except ApiError as error:
        status = error.status
        trace.end(error=error.code)
        raise
    except ClientGoneError:
        status = _CLIENT_GONE_STATUS
        raise
    except BaseException as error:
        status = 500
        trace.end(error=type(error).__name__)
        raise
    finally:
        trace.close(status)


def generation_request(
    context: GatewayContext,
    tenant: str,
    request: CommonRequest,
    prompt: list[int],
    sampling: Sampling,
    max_tokens: int | None,
    default_max_tokens: int | None,
    *,
    has_offsets: bool = False,
) -> GenerationRequest:
    """What the request asks for, for one of its prompts."""
    if max_tokens is not None and (request.min_tokens or 0) > max_tokens:
        raise invalid(f"min_tokens is {request.min_tokens}, more than max_tokens {max_tokens}", "min_tokens")
    stop_ids = request.stop_token_ids or ()
    check_ids(stop_ids, context.tokenizer.vocab_size, "stop_token_ids")
    return GenerationRequest(
        request_id=new_request_id(),
        prompt=prompt,
        num_choices=request.num_choices,
        sampling=sampling,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        min_tokens=request.min_tokens or 0,
        stop=request.stop_strings,
        stop_token_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        tenant=tenant,
        cache_salt=request.cache_salt or "",
        timeout_s=request.timeout_s or context.request_timeout_s,
        has_offsets=has_offsets,
    )


def from_text_error(error: TextError | TokenizerBusyError, param: str) -> ApiError:
    """The text layer's refusals: the client's text at fault, or too much of it waiting."""
    if isinstance(error, TokenizerBusyError):
        return ApiError(503, str(error), code="tokenizer_busy", retry_after_s=1.0)
    return invalid(str(error), param)
