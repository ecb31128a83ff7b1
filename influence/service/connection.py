"""One connection to the service's own server, which is closed when its client is too slow to send the head of a request or to read its answer.

Knows bytes and time, nothing of routes; how long a body may take is for the gate to say. Behind Ray Serve or another proxy, that is the proxy's
affair.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's, which by itself waits for ever for the rest of a head, of which it takes 64 KiB, and for a client that does not read."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = self.config.app.state.service.settings.limits  # type: ignore[union-attr]
        self._head: asyncio.TimerHandle | None = None  # runs while bytes may come, or have come, that belong to no request under way
        self._unread: asyncio.TimerHandle | None = None  # runs while not all that was sent is taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses as soon as the kernel takes no more
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        """Bytes that follow give no more time to those before, be they of a head or of a body that was not waited for."""
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._unread):
            _cancel(timer)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
