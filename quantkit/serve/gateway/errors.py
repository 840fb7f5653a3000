"""Faults in the shape that clients of OpenAI's API read."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException


def format_error(status: int, kind: str, told: str) -> bytes:
    """A fault as JSON. ASCII: what is quoted in it may be half a surrogate."""
    return json.dumps({
        "error": {"message": told, "type": kind, "param": None, "code": status}
    }).encode()


def get_close_headers(status: int) -> dict[str, str]:
    """The header that ends a connection after 408: what still comes belongs to no request."""
    return {"connection": "close"} if status == 408 else {}


def make_error_response(status: int, kind: str, told: str) -> Response:
    """A fault as an answer."""
    return Response(
        format_error(status, kind, told), status, get_close_headers(status), "application/json"
    )


def register_error_handler(app: FastAPI) -> None:
    """Let 404 and 405 be told like every other fault."""

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, fault: HTTPException) -> Response:
        asked = f"{request.method} {request.url.path[:200]}"
        allowed = (fault.headers or {}).get("allow", "")
        expected = allowed or "a path of this API, found none; a client's base URL ends in /v1"
        told = f"{asked}: expected {expected}"
        made = make_error_response(fault.status_code, "invalid_request_error", told)
        made.headers.update(fault.headers or {})
        return made
