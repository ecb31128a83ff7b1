"""What a request can be answered with when not with a result: one exception that carries its HTTP status, a code for programs and a message."""

import re
from collections.abc import Mapping

from influence.errors import RequestError

_PART = r"""[^\s/:;,'"()]+"""
_QUOTED = re.compile(r"""(['"])/(?:(?:(?!\1)[^/])*/)*((?:(?!\1)[^/])+)\1""")
_ABSOLUTE = re.compile(rf"(?<![\w./])/(?:(?:{_PART}(?: {_PART}){{0,3}})?/)*((?!\.+(?!\S)){_PART})")
"""Where a word with a slash follows within four words, they may be one path with spaces, and none of it is told but the end."""


class ServiceError(Exception):
    """An error response: `status` of HTTP, `code` for programs, a message for people, and after how many seconds to try again if that helps."""

    def __init__(self, status: int, code: str, message: str, *, retry_seconds: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_seconds = status, code, message, retry_seconds

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_seconds is None else {"Retry-After": str(self.retry_seconds)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def to_json(self) -> dict[str, dict[str, str]]:
        return {"error": {"code": self.code, "message": self.message}}


def not_found(what: str) -> ServiceError:
    return ServiceError(404, "not_found", what)


def busy(message: str, seconds: int) -> ServiceError:
    return ServiceError(503, "busy", message, retry_seconds=seconds)


def refused(error: RequestError, names: Mapping[str, str]) -> ServiceError:
    """A request that the run cannot serve as it stands; `names` says what to write for each path of this machine."""
    return ServiceError(422, "refused", without_paths(str(error), names))


def stale(error: RequestError, names: Mapping[str, str]) -> ServiceError:
    """A run that cannot be served as it stands: damaged, unfinished, or made from something else."""
    return ServiceError(409, "stale", without_paths(str(error), names))


def without_paths(message: str, names: Mapping[str, str]) -> str:
    """The message with every known path written as its name, the longest first, and of any other absolute path only its last part."""
    for path in sorted(names, key=len, reverse=True):
        message = message.replace(path, names[path])
    return " ".join(_ABSOLUTE.sub(r"\1", _QUOTED.sub(r"\1\2\1", message)).split())
