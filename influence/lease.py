"""The right to work on something that lies in an object store: held by one process, renewed while it lives, free again once it does not.

Claims are numbered objects, and the greatest number holds. A claim is made by creating the next number, which only one of several can, and
only after the last one was released or was not renewed for SECONDS. So whoever was taken for dead and is not finds a greater number.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from influence.errors import RequestError
from influence.object_store import ObjectStore

SECONDS = 60.0
"""After so long without a renewal, whoever held it is taken for dead."""

RENEWED_EVERY = 10.0

log = logging.getLogger("influence")


@contextmanager
def lease(store: ObjectStore, place: str = "lock") -> Iterator[None]:
    """Holds the right for as long as the context lasts.

    Where another process holds it, waits until that shows a sign of life, or until none is left to expect. Raises RequestError in the first case.
    """
    number = _claim(store, place)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, place, number, over), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        _give_back(store, place, number)


def _give_back(store: ObjectStore, place: str, number: int) -> None:
    try:
        store.put(_name(place, number), json.dumps({"holder": _self(), "released": True}).encode())
    except (OSError, RequestError) as error:  # it ends by itself, and what happened within is what the caller must hear of
        log.warning("the claim on %s could not be given back, and ends in %.0f s: %s", store.url, SECONDS, error)


def _claim(store: ObjectStore, place: str) -> int:
    claims = sorted(store.names(place))
    if claims:
        _wait_until_free(store, claims[-1])
    number = 1 + (int(claims[-1].rpartition("/")[2].removesuffix(".json")) if claims else 0)
    if not store.create(_name(place, number), _content(0)):
        raise RequestError(f"another process has just begun to work on {store.url}; wait for it or stop it")
    for old in claims:
        store.delete(old)
    return number


def _wait_until_free(store: ObjectStore, claim: str) -> None:
    seen = store.get(claim)
    held_until = time.monotonic() + SECONDS - store.age(claim)
    holder = _read(seen)
    if holder.get("released"):
        return
    if time.monotonic() < held_until:
        log.warning("waiting for a sign of life of %s, who works on %s", holder.get("holder"), store.url)
    while time.monotonic() < held_until:
        time.sleep(1)
        now = store.get(claim)
        if _read(now).get("released"):
            return
        if now != seen:
            raise RequestError(f"another process is working on {store.url} ({holder.get('holder', 'unknown')}); wait for it or stop it")


def _renew(store: ObjectStore, place: str, number: int, over: threading.Event) -> None:
    renewals = 0
    while not over.wait(RENEWED_EVERY):
        renewals += 1
        try:
            if store.get(_name(place, number + 1)) is not None:
                # Two do the same work now, which costs time and harms nothing: equal work gives equal units, and the first is kept.
                log.warning("another process has taken over %s: this one was not heard of for %.0f s", store.url, SECONDS)
                return
            store.put(_name(place, number), _content(renewals))
        except (OSError, RequestError) as error:
            log.warning("the claim on %s could not be renewed: %s", store.url, error)


def _name(place: str, number: int) -> str:
    return f"{place}/{number:08d}.json"


def _content(renewals: int) -> bytes:
    return json.dumps({"holder": _self(), "renewals": renewals}).encode()


def _self() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _read(content: bytes | None) -> dict[str, Any]:
    try:
        claim = json.loads(content or b"{}")
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}
