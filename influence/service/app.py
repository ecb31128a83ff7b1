"""The service as one ASGI application: the same for a process of its own and for every replica on a cluster."""

import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from influence.errors import RequestError
from influence.service.bodies import ErrorBody
from influence.service.catalog import Catalog
from influence.service.engine import Engine
from influence.service.errors import ServiceError
from influence.service.gate import Gate
from influence.service.metrics import Metrics
from influence.service.routes import Service, router
from influence.service.settings import ServiceSettings
from influence.service.store import QueryStore
from influence.service.tokens import Tokens

log = logging.getLogger("influence.service")

STOP_SECONDS = 20.0

DESCRIPTION = """Which training examples made this language model say that? Influence functions with EK-FAC curvature, answered from a stored index.

Scores are in nats: the predicted change of the completion's log-probability if one more copy of the training sequence had been in the training set.
Errors are `{"error": {"code", "message"}}`."""

CODES = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large", 422: "invalid"}


def create_app(settings: ServiceSettings) -> FastAPI:
    """The application. Its runs are loaded when it starts; `app.state.service` holds its parts.

    Raises RequestError when the state directory or the file of tokens cannot be used, or when there are no tokens and others than this machine
    can ask.
    """
    if settings.tokens_file is None and not settings.loopback:
        raise RequestError("without tokens only this machine may ask: listen on 127.0.0.1, or make tokens with `influence tokens add`")
    tokens = Tokens(settings.tokens_file) if settings.tokens_file is not None else None
    metrics = Metrics()
    catalog = Catalog(settings)
    store = QueryStore(settings.state_dir, settings.limits)
    service = Service(
        settings=settings, catalog=catalog, store=store, metrics=metrics, engine=Engine(catalog, store, metrics, settings.limits)
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start(list(settings.runs))
        yield
        if await run_in_threadpool(service.engine.stop, STOP_SECONDS):
            store.close()  # otherwise the work under way still uses it; the end of the process closes it

    app = FastAPI(
        title="influence",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # they fetch scripts from elsewhere
        redoc_url=None,
        responses={500: {"model": ErrorBody, "description": "a defect: the log says more under X-Request-Id"}},
    )
    app.state.service = service
    app.add_middleware(Gate, settings=settings, tokens=tokens, metrics=metrics)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(sqlite3.Error, _store_error)
    app.include_router(router(service))
    page = Path(str(resources.files("influence.service"))) / "page"
    if page.is_dir():
        app.mount("/", StaticFiles(directory=page, packages=[("influence.report", "shared")], html=True), name="page")
    return app


async def _service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _store_error(_: Request, error: Exception) -> JSONResponse:
    """The disk is full, or gone: quick queries are answered all the same."""
    log.error("the state directory cannot be used", exc_info=error)
    said = ServiceError(503, "unavailable", f"the service cannot write down or read its queries now ({error})", retry_seconds=30)
    return JSONResponse(said.to_json(), said.status, said.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    status, headers, methods = error.status_code, dict(error.headers or {}), _methods(request.app, path)
    if status == 405 and methods:
        headers["Allow"] = ", ".join(sorted(methods))
    elif status == 405 and path.startswith("/v1"):
        status = 404  # it was the page, which has no such file, that refused the method
    said = ServiceError(status, CODES.get(status, "refused"), str(error.detail))
    return JSONResponse(said.to_json(), status, headers)


def _methods(app: FastAPI, path: str) -> set[str]:
    """What this path can be asked by; several routes may share it."""
    return {method.upper() for known, methods in app.openapi()["paths"].items() if compile_path(known)[0].match(path) for method in methods}


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """What pydantic says, in one line; 400 when the body is not even JSON."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    not_json = any(one["type"] == "json_invalid" for one in found)
    messages = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg'].removeprefix('Value error, ')}" for one in found[:5]]
    said = ServiceError(400 if not_json else 422, "malformed" if not_json else "invalid", "; ".join(messages))
    return JSONResponse(said.to_json(), said.status)
