"""Objects below one URL of an object store: get, put, create if absent, list, delete. The only module that knows fsspec.

Knows nothing of runs. An object appears whole or not at all; whoever lists or gets sees what was put before.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from influence.errors import RequestError

EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Schemes of URLs, and our extra that installs what speaks each. Only stores with a conditional put can keep two processes apart."""


class ObjectStore:
    """The objects below a URL such as s3://bucket/prefix, by names relative to it.

    Credentials and addresses are found as the store's own tools find them (for S3: AWS_PROFILE, AWS_ENDPOINT_URL, an instance's role …).
    What a user must change (a bucket, credentials, rights) is a RequestError, what may pass is an OSError.
    """

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        self.url = url.rstrip("/")
        self._scheme, self._root = scheme, rest.strip("/")
        if scheme not in EXTRAS:
            raise RequestError(f"{url}: runs are kept in directories and at s3:// or gs://, not at {scheme}://")
        if not all(self._root.partition("/")[::2]):
            raise RequestError(f"{url}: expected a bucket and a name in it, such as {scheme}://bucket/runs/mine")

    @cached_property
    def _files(self) -> Any:
        import fsspec

        try:
            # Listings that are kept would hide what other machines write.
            return fsspec.filesystem(self._scheme, use_listings_cache=False, skip_instance_cache=True)
        except ImportError:
            extra = EXTRAS[self._scheme]
            raise RequestError(f"{self.url} needs what speaks {self._scheme}://: pip install 'influence[{extra}]'") from None

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (RequestError, FileExistsError):
            raise
        except FileNotFoundError as error:
            raise RequestError(f"{self.url}: {_first_line(error)}") from None
        except PermissionError as error:
            raise RequestError(f"{self.url}: these credentials may not do this: {_first_line(error)}") from None
        except Exception as error:  # the stores' clients have errors of their own for everything
            if "Credential" in type(error).__name__ or "credential" in str(error).lower() or "Profile" in type(error).__name__:
                raise RequestError(f"{self.url}: {_first_line(error)}: give credentials as for the store's own tools") from None
            raise OSError(f"{self.url}: {type(error).__name__}: {_first_line(error)}") from error

    def get(self, name: str) -> bytes | None:
        """The object's content; None when there is no such object (or no such bucket)."""
        with self._asking():
            try:
                return bytes(self._files.cat_file(self._key(name)))
            except FileNotFoundError:
                return None

    def get_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of those of the objects that are there, many at once."""
        if not names:
            return {}
        with self._asking():
            found: Mapping[str, bytes] = self._files.cat([self._key(name) for name in names], on_error="omit")
        return {name: found[self._key(name)] for name in names if self._key(name) in found}

    def put(self, name: str, content: bytes) -> None:
        with self._asking():
            self._files.pipe_file(self._key(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Puts the object unless there is one of this name; whether it did. Of several who try at once, one does."""
        with self._asking(), contextlib.suppress(FileExistsError):
            self._files.pipe_file(self._key(name), content, mode="create")
            return True
        return False

    def create_from(self, path: Path, name: str) -> bool:
        """As `create`, with the content of a file."""
        with self._asking(), contextlib.suppress(FileExistsError):
            self._files.put_file(str(path), self._key(name), mode="create")
            return True
        return False

    def fetch(self, name: str, path: Path) -> bool:
        """Copies the object to a file; whether there was one."""
        with self._asking():
            try:
                self._files.get_file(self._key(name), str(path))
            except FileNotFoundError:
                return False
        return True

    def names(self, place: str) -> list[str]:
        """The names of all objects below `place`, the one that was put first coming first."""
        with self._asking():
            try:
                found: Mapping[str, Mapping[str, Any]] = self._files.find(self._key(place), detail=True)
            except FileNotFoundError:
                return []
        names = sorted(found, key=lambda key: (_put_at(found[key]), key))
        return [key.removeprefix(self._root).lstrip("/") for key in names if key != self._key(place)]

    def age(self, name: str) -> float:
        """Seconds since the object was put, as far as this machine's clock agrees with the store's."""
        with self._asking():
            put: datetime = self._files.modified(self._key(name))
        return max(0.0, (datetime.now(UTC) - put).total_seconds())

    def delete(self, name: str) -> None:
        """Removes the object, if it is there."""
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(name))


def _put_at(facts: Mapping[str, Any]) -> datetime:
    put = facts.get("LastModified") or facts.get("mtime")
    return put if isinstance(put, datetime) else datetime.min.replace(tzinfo=UTC)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
