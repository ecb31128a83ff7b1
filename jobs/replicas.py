"""The service on Ray Serve: the same application in several replicas, behind Serve's proxy. They share one state directory, and so one queue."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from influence.config import ResourcesConfig
from influence.errors import RequestError
from influence.service.app import create_app
from influence.service.logs import write_json_logs
from influence.service.settings import ServiceSettings
from jobs.executors import ray_connection

NAME = "influence"

SHUTDOWN_SECONDS = 30
"""As long as Serve is given to end what it is doing."""


def deploy(settings: ServiceSettings, replicas: int, cpus_per_replica: float = 1.0) -> None:
    """Runs the application on the Ray that this process is connected to, in so many replicas, each with its own models in memory.

    Accepted queries wait in the SQLite file of the state directory, which all replicas must see: those of one machine, or machines with a file
    system in common on which SQLite's locks work.
    """

    def application() -> object:
        write_json_logs()
        return create_app(settings)

    limit = settings.limits.requests
    deployment = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=limit,
        ray_actor_options={"num_cpus": cpus_per_replica},
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
    )(serve.ingress(application)())
    serve.run(deployment.bind(), name=NAME, route_prefix="/")


@contextmanager
def deployed(settings: ServiceSettings, host: str, port: int, replicas: int) -> Iterator[None]:
    """Within it, the application is served from the Ray that this process is connected to. Where Serve runs already, other applications stay.

    Raises RequestError when it serves elsewhere than at this address, or something else there.
    """
    there = _get_global_client(raise_if_no_controller_running=False)
    if there is not None:
        _check_room(there.get_serve_details(), host, port)
    else:
        _wait_for_the_last()
    serve.start(http_options={"host": host, "port": port})
    try:
        deploy(settings, replicas)
        yield
    finally:
        if there is None:
            serve.shutdown()
        else:
            serve.delete(NAME)


def _wait_for_the_last() -> None:
    """Serve that was shut down a moment ago has proxies that are still ending, which a new controller would take for its own."""
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    while time.monotonic() < deadline and any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        time.sleep(0.1)


def _check_room(details: Mapping[str, Any], host: str, port: int) -> None:
    listens = details["http_options"]
    if (listens["host"], listens["port"]) != (host, port):
        raise RequestError(
            f"Ray Serve runs on this cluster already and listens on {listens['host']}, port {listens['port']}, not on {host}, port {port}: "
            f"take its --host and --port, or another cluster"
        )
    for name, application in details["applications"].items():
        if name == NAME or application["route_prefix"] == "/":
            raise RequestError(f"this cluster serves an application called {name} at / already: stop it, or take another cluster")


def serve_on_ray(
    settings: ServiceSettings, host: str, port: int, replicas: int, address: str | None, listening: Callable[[str], None]
) -> None:
    """Serves from replicas until SIGTERM or SIGINT; `listening` is called with the address."""
    create_app(settings).state.service.store.close()  # what is wrong with the settings is said here and not in a replica's log
    ended = threading.Event()
    with ray_connection(ResourcesConfig(address=address, workers=replicas)), deployed(settings, host, port, replicas):
        listening(f"http://{host}:{port}/")
        for stopping in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stopping, lambda *_: ended.set())
        ended.wait()
