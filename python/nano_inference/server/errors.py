"""Refusals and failures in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CLIENT_GONE = 499  # nginx's number, for logs and metrics: the client did not wait for the answer
RETRY_AFTER = {"Retry-After": "1"}


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorInfo


class ApiError(Exception):
    """An answer other than success. `param` is the field of the body that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> ErrorBody:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return ErrorBody(ErrorInfo(self.message, kind, self.param, self.code))

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return JsonResponse(content, status_code=status, headers=headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(why: str) -> ApiError:
    return ApiError(503, why, code="unavailable", headers=RETRY_AFTER)


def queue_full(why: str) -> ApiError:
    return ApiError(429, why, code="queue_full", headers=RETRY_AFTER)


def timed_out(seconds: float, headers: Mapping[str, str] | None = None) -> ApiError:
    why = f"the request took longer than {seconds:g} s"
    return ApiError(504, why, code="timeout", headers=headers)


def from_value_error(error: ValueError, fields: Mapping[str, str]) -> ApiError:
    """What the engine refuses. Its messages begin with the name of the field; `fields` says what
    the request calls it (the engine's `logprobs` may be the request's `top_logprobs`)."""
    message = str(error)
    if message.startswith(("the prompt has", "a prompt of", "the prompt is empty")):
        code = None if "empty" in message else "context_length_exceeded"
        return refused(message, fields["prompt"], code)
    found = re.match(r"(\w+)", message)
    name = found.group(1) if found else ""
    if name not in fields:
        return refused(message)
    renamed = fields[name]
    return refused(renamed + message[len(name) :], renamed)
