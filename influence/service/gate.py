"""What every request passes on its way in and out: host and origin, token and scope, the number of requests under way, security headers, the audit
line and the metrics. Knows nothing of what the routes do.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from influence.service.errors import ServiceError, busy
from influence.service.metrics import Metrics
from influence.service.settings import Limits, ServiceSettings, is_loopback
from influence.service.store import new_id
from influence.service.tokens import LOCAL, Tokens, User

log = logging.getLogger("influence.service")
audit = logging.getLogger("influence.service.audit")

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Gate:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, *, settings: ServiceSettings, tokens: Tokens | None, metrics: Metrics) -> None:
        self._app, self._settings, self._tokens, self._metrics = app, settings, tokens, metrics
        self._under_way = 0
        self._streams: Counter[str] = Counter()  # by user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line: dict[str, Any] = {"request": new_id(), "method": scope["method"], "path": scope["path"], "status": 500, "bytes": 0}
        line["client"] = scope["client"][0] if scope.get("client") else None
        scope.setdefault("state", {})["audit"] = line
        started, start = False, time.monotonic()

        async def outward(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, line["status"] = True, message["status"]
                _add_headers(message, scope["path"], line["request"])
            elif message["type"] == "http.response.body":
                line["bytes"] += len(message.get("body", b""))
            await send(message)

        streams = _is_stream(scope)
        self._count(not streams)
        try:
            self._admit(scope, line)
            with self._counted(line["user"]) if streams else nullcontext():
                await self._app(scope, _bounded(receive, self._settings.limits), outward)
        except ServiceError as error:
            await JSONResponse(error.to_json(), error.status, error.headers)(scope, receive, outward)
        except Exception:
            log.exception("a request failed", extra={"request": line["request"]})
            if started:
                raise
            said = ServiceError(500, "failed", f"the service failed at this request; its log says why under {line['request']}")
            await JSONResponse(said.to_json(), said.status)(scope, receive, outward)
        finally:
            self._count(-(not streams))
            self._write_down(scope, line, time.monotonic() - start)

    def _admit(self, scope: Scope, line: dict[str, Any]) -> None:
        """Raises ServiceError for a request that goes no further."""
        headers = Headers(scope=scope)
        try:
            hostname = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            raise ServiceError(400, "malformed", "the Host header is no name of a host") from None
        if self._tokens is None and not is_loopback(hostname):  # with tokens, a proxy may keep the name that it was asked by
            raise ServiceError(403, "forbidden", "this service listens to its own machine: ask for localhost or 127.0.0.1")
        if int(headers.get("content-length") or 0) > self._settings.limits.body_bytes:
            raise ServiceError(413, "too_large", _too_large(self._settings.limits.body_bytes))
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and not _is_of(origin, headers.get("host")):
            raise ServiceError(403, "forbidden", "a page of another origin may not ask this service")
        needed = "admin" if scope["path"] == "/metrics" else "query" if scope["path"].startswith("/v1") else None
        if needed is None:
            return
        user = self._user(headers)
        line["user"], scope["state"]["user"] = user.name, user
        if needed not in user.scopes and "admin" not in user.scopes:
            raise ServiceError(403, "forbidden", f"the token has no scope {needed}")
        if self._under_way > self._settings.limits.requests:
            raise busy(f"{self._settings.limits.requests} requests are under way already", 1)

    @contextmanager
    def _counted(self, user: str) -> Iterator[None]:
        """Within it, this user listens to one more event stream. Raises 503 when these are too many; they are left out of the requests under way,
        which are short."""
        if self._streams[user] >= self._settings.limits.streams:
            raise busy(f"{self._settings.limits.streams} event streams of yours are open already", 5)
        self._streams[user] += 1
        try:
            yield
        finally:
            self._streams[user] -= 1

    def _user(self, headers: Headers) -> User:
        if self._tokens is None:
            return LOCAL
        scheme, _, token = headers.get("authorization", "").partition(" ")
        user = self._tokens.user(token.strip()) if scheme.lower() == "bearer" and token.strip() else None
        if user is None:
            raise ServiceError(401, "unauthorized", "send a token of this service: Authorization: Bearer …")
        return user

    def _write_down(self, scope: Scope, line: dict[str, Any], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.requests.labels(scope["method"] if route != "other" else "any", route, str(line["status"])).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if scope["path"] not in ("/healthz", "/readyz", "/metrics"):
            audit.info("request", extra=line | {"route": route, "seconds": round(seconds, 4)})

    def _count(self, more: int) -> None:
        self._under_way += more
        self._metrics.requests_under_way.set(self._under_way)


def _is_stream(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith("/v1/queries/") and path.endswith("/events")


def _is_of(origin: str, host: str | None) -> bool:
    """Whether a page of this origin is the service's own."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """`receive`, which raises 413 when a body has more bytes than are allowed, and 408 when it takes longer to arrive."""
    received, complete, deadline = 0, False, time.monotonic() + limits.body_seconds

    async def inward() -> Message:
        nonlocal received, complete
        try:
            message = await (receive() if complete else asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > limits.body_bytes:
            raise HTTPException(413, _too_large(limits.body_bytes))
        return message

    return inward


def _too_large(limit: int) -> str:
    return f"the body has more than {limit:,} bytes"


def _add_headers(message: Message, path: str, request: str) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value
    headers["X-Request-Id"] = request
    if "content-security-policy" not in headers:
        headers["Content-Security-Policy"] = PAGE_POLICY
    if path.startswith(("/v1", "/metrics")):
        headers["Cache-Control"] = "no-store"
