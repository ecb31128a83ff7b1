"""The application in a process of its own: uvicorn, with a stop that lets requests under way finish and hands accepted work back to the queue."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from influence.errors import RequestError
from influence.service.app import create_app
from influence.service.connection import Connection
from influence.service.logs import write_json_logs
from influence.service.settings import ServiceSettings

GRACE_SECONDS = 30


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_exit()
        super().handle_exit(sig, frame)


def configuration(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def serve(settings: ServiceSettings, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. `listening` is called with the address, once requests are taken; port 0 takes a free one.

    Raises RequestError when it cannot listen there.
    """
    app = create_app(settings)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RequestError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    write_json_logs()
    config = configuration(app)
    for stopping in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal once more when it is done; that is no news then
        signal.signal(stopping, lambda *_: None)
    shown = f"[{host}]" if ":" in host else host
    listening(f"http://{shown}:{listener.getsockname()[1]}/")
    _Server(config, app.state.service.engine.drain).run(sockets=[listener])
