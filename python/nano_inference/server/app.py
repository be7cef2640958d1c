"""The Starlette application: routes, and errors in OpenAI's format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from .chat import read_chat
from .completions import read_completion
from .endpoints import CompletionEndpoint
from .errors import RETRY_AFTER, ApiError, json_response
from .openapi import openapi_document
from .protocol import ModelCard, ModelList
from .tokenize import detokenize, tokenize
from .trace import trace, trace_stream

if TYPE_CHECKING:
    from .state import ServerState

logger = logging.getLogger("nano_inference.server")


def create_app(state: ServerState, middleware: Sequence[Middleware] = ()) -> Starlette:
    """Handlers find `state` at app.state.server."""
    app = Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", model, methods=["GET"]),
            Route(
                "/v1/completions",
                CompletionEndpoint("completions", read_completion),
                methods=["POST"],
            ),
            Route(
                "/v1/chat/completions",
                CompletionEndpoint("chat_completions", read_chat),
                methods=["POST"],
            ),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/v1/engine/trace", trace, methods=["GET"]),
            Route("/v1/engine/trace/stream", trace_stream, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
        ],
        middleware=list(middleware),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, 500: _failure},
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


# -- Errors ---------------------------------------------------------------------------------------


async def _api_error(request: Request, error: Any) -> Response:
    return error.response()


async def _http_error(request: Request, error: Any) -> Response:
    """Starlette's own: no such route, wrong method."""
    message, method, path = error.detail, request.method, request.scope["path"]
    if error.status_code == 404:
        message = f"there is no {method} {path} (see /openapi.json)"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} does not take {method}, only {allowed}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _failure(request: Request, error: Any) -> Response:
    return ApiError(500, "the server failed", code="internal_error").response()


# -- Small routes ---------------------------------------------------------------------------------


def _state(request: Request) -> ServerState:
    return request.app.state.server


def _card(state: ServerState, name: str) -> ModelCard:
    longest = None if state.llm is None else state.llm.engine.core.config.max_model_len
    return ModelCard(name, state.created, longest)


async def models(request: Request) -> Response:
    state = _state(request)
    return json_response(ModelList([_card(state, name) for name in state.model_names]))


async def model(request: Request) -> Response:
    state, name = _state(request), request.path_params["model"]
    if name not in state.model_names:
        text = f"the model {name!r} is not served here"
        raise ApiError(404, text, param="model", code="model_not_found")
    return json_response(_card(state, name))


async def health(request: Request) -> Response:
    if (why := _state(request).unhealthy_because()) is not None:
        raise ApiError(503, why, code="unhealthy", headers=RETRY_AFTER)
    return json_response({"status": "ok"})


async def metrics(request: Request) -> Response:
    body, content_type = _state(request).metrics.render()
    return Response(body, headers={"Content-Type": content_type})


async def version(request: Request) -> Response:
    return json_response({"version": __version__})


async def openapi(request: Request) -> Response:
    return json_response(openapi_document(_state(request), request.scope.get("root_path", "")))
