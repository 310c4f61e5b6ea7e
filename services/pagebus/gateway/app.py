"""The FastAPI application: which path leads where, errors of the framework in OpenAI's shape, and `/docs`.

Hot routes are raw ASGI endpoints; FastAPI routes to them and describes them.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pagebus.gateway.answer_types import ChatCompletion, Completion, ModelCard, ModelList
from pagebus.gateway.boundary import Boundary
from pagebus.gateway.chat import ChatEndpoint
from pagebus.gateway.completions import CompletionEndpoint
from pagebus.gateway.context import GatewayContext, pagebus_version
from pagebus.gateway.errors import ApiError, ErrorResponse
from pagebus.gateway.health import Health, HealthEndpoint, Readiness, ReadyEndpoint, Version, VersionEndpoint
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.metrics import MetricsEndpoint
from pagebus.gateway.models_route import ModelsEndpoint
from pagebus.gateway.openai_types import ChatRequest, CompletionRequest
from pagebus.gateway.responder import Endpoint
from pagebus.gateway.streams_route import StreamsEndpoint

_REFERENCE = "#/components/schemas/{name}"


def build_app(context: GatewayContext) -> ASGIApp:
    """The whole HTTP surface of one gateway, as a pure ASGI application."""
    chat, completions = ChatEndpoint(context), CompletionEndpoint(context)
    app = FastAPI(title="pagebus", version=pagebus_version(), redoc_url=None)
    app.router.redirect_slashes = False
    models = ModelsEndpoint(context)
    app.router.routes.extend(
        [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/streams/{stream_id}", StreamsEndpoint(context), methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model_id:path}", models, methods=["GET"]),
            Route("/health", HealthEndpoint(context), methods=["GET"]),
            Route("/ready", ReadyEndpoint(context), methods=["GET"]),
            Route("/version", VersionEndpoint(), methods=["GET"]),
            Route("/metrics", MetricsEndpoint(context), methods=["GET"]),
        ]
    )
    app.add_exception_handler(HTTPException, _http_error)
    schema = _schema()
    app.openapi = lambda: schema  # type: ignore[method-assign]
    hot = {"/v1/chat/completions": chat, "/v1/completions": completions}
    return Boundary(_HotPaths(app, hot), context.keys)


class _HotPaths:
    """Leads the paths of nearly all requests past the framework, which takes a tenth of a millisecond to find
    what it was told: it still describes them, and answers for them to other methods."""

    def __init__(self, app: ASGIApp, hot: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._hot = hot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._hot.get(scope["path"]) if is_post else None
        await (self._app if endpoint is None else endpoint)(scope, receive, send)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path, method = request.scope["path"][:200], request.scope["method"]
    if status == HTTPStatus.NOT_FOUND:
        fault = ApiError(status, f"there is no route {path!r}", code="route_not_found")
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        fault = ApiError(status, f"{path!r} does not take {method}", code="method_not_allowed")
    else:
        fault = ApiError(status, HTTPStatus(status).phrase)
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(fault.encode(), status, headers, "application/json")


def _schema() -> dict[str, Any]:
    """An OpenAPI document made from the structs."""
    types = [
        ChatRequest, CompletionRequest, ChatCompletion, Completion, ModelList, ModelCard, ErrorResponse,
        Health, Readiness, Version,
    ]  # fmt: skip
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    return {
        "openapi": "3.1.0",
        "info": {"title": "pagebus", "version": pagebus_version()},
        "paths": {
            "/v1/chat/completions": {"post": _operation("Answer a chat", ChatCompletion, ChatRequest)},
            "/v1/completions": {"post": _operation("Go on with a text", Completion, CompletionRequest)},
            "/v1/streams/{stream_id}": {
                "get": _operation("The rest of a stored stream", parameter="stream_id")
            },
            "/v1/models": {"get": _operation("Served models", ModelList)},
            "/v1/models/{model_id}": {"get": _operation("One model", ModelCard, parameter="model_id")},
            "/health": {"get": _operation("Whether requests get on", Health)},
            "/ready": {"get": _operation("Whether a request would be answered now", Readiness)},
            "/version": {"get": _operation("Installed version", Version)},
            "/metrics": {"get": _operation("Prometheus metrics")},
        },
        "components": {"schemas": components},
    }


def _operation(
    summary: str,
    answer: type[msgspec.Struct] | None = None,
    body: type[msgspec.Struct] | None = None,
    parameter: str | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "OK"}}}
    if answer is not None:
        operation["responses"]["200"]["content"] = _content(answer)
        operation["responses"]["default"] = {"description": "Error", "content": _content(ErrorResponse)}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _content(body)}
    if parameter is not None:
        operation["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _content(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(name=struct.__name__)}}}
