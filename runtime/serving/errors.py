"""Errors in OpenAI's form."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reft_edge.errors import ReftEdgeError, SignatureError
from reft_edge.runtime.adapter_folder import AdapterMemoryError, UnknownAdapterError
from reft_edge.runtime.engine import ClosingError, QueueFullError
from reft_edge.runtime.memory import NoMemoryError

_log = logging.getLogger(__name__)
CLIENT_LEFT = 499
"""What is counted for a client that went away before its answer."""
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_LATER = {"Retry-After": "1"}


class ApiError(ReftEdgeError):
    """An answer in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.headers, self.param = status, code, dict(headers or {}), param


def as_api_error(error: ReftEdgeError) -> ApiError:
    """Any refusal as an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "queue_full", _LATER)
    if isinstance(error, AdapterMemoryError):
        return ApiError(429, str(error), "adapter_memory_full", _LATER)
    if isinstance(error, NoMemoryError):
        return ApiError(503, str(error), "no_memory", _LATER)
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), "closing")
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), "model_not_found", param="model")
    if isinstance(error, SignatureError):
        _log.warning("%s", error)
        return ApiError(403, str(error), "adapter_not_trusted")
    return ApiError(400, str(error))


def row_error(error: ReftEdgeError) -> ApiError:
    """What ended a row: no memory, which may come back, or what this request asked for."""
    if isinstance(error, NoMemoryError):
        return as_api_error(error)
    return ApiError(400, str(error), "generation_failed")


def too_long(context: int, tokens: int | str, what: str) -> ApiError:
    """In OpenAI's words, by which clients know it."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, your {what} resulted in {tokens} tokens. "
        f"Please reduce the length of the {what}.",
        "context_length_exceeded",
        param=what,
    )


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    """The whole answer."""
    return JSONResponse(error_body(error), error.status, error.headers)


def add_errors(app: FastAPI) -> None:
    """Have every refusal of the routes answered in this form."""

    @app.exception_handler(ReftEdgeError)
    async def on_refusal(_request: Request, error: ReftEdgeError) -> Response:
        return error_response(as_api_error(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.scope['path']}: {error.detail}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))
