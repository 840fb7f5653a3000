"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException


class RequestRejected(Exception):
    """A rejected request: HTTP status, error type of OpenAI's API, and message."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.status, self.kind = status, kind
        super().__init__(message)


class ClientDisconnected(Exception):
    """The client disconnected before its request was read."""


class BudgetExceeded(Exception):
    """Bytes exceed the budget of all requests in progress."""


def format_error(status: int, kind: str, message: str) -> bytes:
    """Format an error as JSON. ASCII: a message may quote half of a surrogate pair."""
    return json.dumps({
        "error": {"message": message, "type": kind, "param": None, "code": status}
    }).encode()


def get_close_headers(status: int) -> dict[str, str]:
    """Return the header that closes a connection after 408: later bytes belong to no request."""
    return {"connection": "close"} if status == 408 else {}


def make_error_response(status: int, kind: str, message: str) -> Response:
    """Make the HTTP response of an error."""
    return Response(
        format_error(status, kind, message), status, get_close_headers(status), "application/json"
    )


def register_error_handler(app: FastAPI) -> None:
    """Report 404 and 405 in the format of the other errors."""

    @app.exception_handler(HTTPException)
    async def report_http_exception(request: Request, fault: HTTPException) -> Response:
        target = f"{request.method} {request.url.path[:200]}"
        allowed = (fault.headers or {}).get("allow", "")
        expected = allowed or "a path of this API, found none; a client's base URL ends in /v1"
        message = f"{target}: expected {expected}"
        response = make_error_response(fault.status_code, "invalid_request_error", message)
        response.headers.update(fault.headers or {})
        return response
