"""A run directory in an object store: objects named as the files of a local one, and a local cache in which the units in use are files.

A unit is done if and only if its record.json is there, which is written last and says which objects are the unit's. A unit's files are fetched
into the cache when their path is asked for, and checked against sizes and checksums on the way. Small records (run.json, progress.json, answers)
are read and written where they are. Nothing that is there is ever replaced but these.
"""

import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from influence.config import is_url
from influence.errors import RequestError
from influence.lease import lease
from influence.living import Living
from influence.object_store import ObjectStore
from influence.run_directory import RunDirectory, digest, file_digest, read_answer

SECONDS_BETWEEN_PROGRESS = 5.0
FETCHED_AT_ONCE = 16


def run_directory(place: Path | str) -> RunDirectory:
    """The run directory at a path, or at a URL such as s3://bucket/run."""
    return StoredRunDirectory(place) if isinstance(place, str) and is_url(place) else RunDirectory(Path(place))


def cache_directory() -> Path:
    """Where units of stored runs are kept on this machine: INFLUENCE_CACHE, or `influence` in the user's cache directory."""
    own, xdg = os.environ.get("INFLUENCE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser().absolute() if own else (Path(xdg) if xdg else Path.home() / ".cache") / "influence"


class StoredRunDirectory(RunDirectory):
    """Names, records and claims of one run in an object store."""

    def __init__(self, url: str) -> None:
        self.store = ObjectStore(url)
        self._records: dict[tuple[str, str], dict[str, Any]] = {}  # of units that are done: they do not change
        self._last_progress = -SECONDS_BETWEEN_PROGRESS

    def __str__(self) -> str:
        return self.store.url

    @property
    def name(self) -> str:
        return self.store.url.rpartition("/")[2]

    @cached_property
    def path(self) -> Path:
        """The cache: of this run and not of another that was at the same URL before."""
        made = self.describe().get("made")
        return cache_directory() / f"{self.name}-{digest([self.store.url, made]).removeprefix('sha256:')[:16]}"

    def _begin(self, description: Mapping[str, Any]) -> bool:
        if self._read("run.json") is not None:
            return False
        self._check_not_foreign()
        return self.store.create("run.json", _json({**description, "made": uuid.uuid4().hex}))

    def version(self) -> object:
        return None  # nothing here is made anew under a name that is there

    @cached_property
    def living(self) -> Living:
        """What was changed while the run was in a local directory, from which it was copied here."""
        content = self._read("living.json")
        return Living() if content is None else Living.from_json(content, f"{self}/living.json")

    is_local = False

    def check_changeable(self) -> None:
        raise RequestError(
            f"{self} is in an object store, where sequences are neither appended nor removed, nor models retrained: "
            "copy the run into a local or mounted directory, and from there back to another place"
        )

    def check_keeps_files(self, option: str) -> None:
        raise RequestError(f"{self} is in an object store: say with {option} where this goes")

    # units of work

    def unit_names(self, stage: str) -> list[str]:
        return sorted({name.split("/")[1] for name in self._done_records(stage)})

    def _done_records(self, stage: str) -> list[str]:
        return [name for name in self.store.names(stage) if name.count("/") == 2 and name.endswith("/record.json")]

    def missing(self, stage: str, units: Sequence[str], fingerprint: str) -> list[str]:
        """As one by one, with one listing: what is done is not told unit by unit."""
        listed = set(self._done_records(stage))
        there = {unit for unit in units if self._record_name(stage, unit) in listed}
        self._read_records(stage, [unit for unit in units if unit in there])
        return [unit for unit in units if unit not in there or not self.is_done(stage, unit, fingerprint)]

    def _read_records(self, stage: str, units: Sequence[str]) -> None:
        """Many at once, of which the known ones are not read again."""
        names = {unit: self._record_name(stage, unit) for unit in units if (stage, unit) not in self._records}
        contents = self.store.get_all(list(names.values()))
        for unit, name in names.items():
            if name in contents:
                self._records[stage, unit] = self._parsed(stage, unit, contents[name])

    def is_done(self, stage: str, unit: str, fingerprint: str) -> bool:
        if super().is_done(stage, unit, fingerprint):
            return True
        record = self._record(stage, unit)
        if record is None:
            return False
        if record["fingerprint"] != fingerprint:
            raise RequestError(
                f"{self._url(stage, unit)} was made from something else (its fingerprint is {record['fingerprint']}, expected {fingerprint}); "
                "use a new run directory"
            )
        return True

    def fingerprint_of(self, stage: str, unit: str) -> str:
        record = self._record(stage, unit)
        return str(record["fingerprint"]) if record else super().fingerprint_of(stage, unit)

    def unit_path(self, stage: str, unit: str) -> Path:
        """Where the unit's files are in the cache, to which they are fetched first. Raises RequestError for an object that is not what was put."""
        path = self._place(stage, unit)
        record = None if path.exists() else self._record(stage, unit)
        if record is not None:
            self._fetch(stage, unit, record, path)
        return path

    def bring(self, stage: str, units: Sequence[str]) -> None:
        wanted = [unit for unit in units if not self._place(stage, unit).exists()]
        self._read_records(stage, wanted)
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
            list(threads.map(lambda unit: self.unit_path(stage, unit), wanted))

    def _fetch(self, stage: str, unit: str, record: Mapping[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
        try:
            for name, facts in record["files"].items():
                self._fetch_file(stage, unit, name, facts, scratch / name)
            (scratch / "record.json").write_bytes(_json(record))
            scratch.chmod(0o755)
            try:
                scratch.rename(path)
            except OSError:
                if not path.exists():  # else another process has fetched it meanwhile
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _fetch_file(self, stage: str, unit: str, name: str, facts: Mapping[str, Any], path: Path) -> None:
        found = self.store.fetch(f"{self._prefix(stage, unit)}/{facts.get('object', name)}", path)
        size = path.stat().st_size if found else None
        if size == facts["bytes"] and file_digest(path) == facts["sha256"]:
            return
        state = (
            "is missing"
            if size is None
            else f"is damaged: {size:,} bytes"
            if size != facts["bytes"]
            else "is damaged: its checksum differs"
        )
        raise RequestError(
            f"{self._url(stage, unit)}/{facts.get('object', name)} {state}, expected {facts['bytes']:,} bytes with {facts['sha256'][:19]}…; "
            f"delete {self._url(stage, unit)}/ to have it made again"
        )

    def _publish(self, scratch: Path, stage: str, unit: str, fingerprint: str) -> None:
        """Puts the files, then the record. Where another process was first, its unit is kept: nothing of it is ever written over."""
        record = json.loads((scratch / "record.json").read_bytes())
        for name, facts in record["files"].items():
            place = f"{self._prefix(stage, unit)}/{name}"
            if not self.store.create_from(scratch / name, place) and not self._holds(place, facts, scratch):
                # Of somebody who died, or is still at it, with other bytes: a GPU does not round the same way twice.
                facts["object"] = f"{facts['sha256'].removeprefix('sha256:')[:16]}-{name}"
                self.store.create_from(scratch / name, f"{self._prefix(stage, unit)}/{facts['object']}")
        if self.store.create(self._record_name(stage, unit), _json(record)):
            (scratch / "record.json").write_bytes(_json(record))
            super()._publish(scratch, stage, unit, fingerprint)
        else:
            self.is_done(stage, unit, fingerprint)  # refuses one that was made from something else

    def _holds(self, place: str, facts: Mapping[str, Any], scratch: Path) -> bool:
        """Whether the object has the bytes of this file."""
        there = scratch / ".there"
        try:
            return self.store.fetch(place, there) and file_digest(there) == facts["sha256"]
        finally:
            there.unlink(missing_ok=True)

    def _record(self, stage: str, unit: str) -> dict[str, Any] | None:
        if (stage, unit) not in self._records:
            content = self.store.get(self._record_name(stage, unit))
            if content is None:
                return None
            self._records[stage, unit] = self._parsed(stage, unit, content)
        return self._records[stage, unit]

    def _parsed(self, stage: str, unit: str, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content)
            for facts in record["files"].values():
                int(facts["bytes"])
                str(facts["sha256"]).removeprefix("sha256:")
            return {"fingerprint": str(record["fingerprint"]), "files": dict(record["files"])}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(
                f"{self._url(stage, unit)}/record.json is damaged: it is not a unit's record; delete {self._url(stage, unit)}/ to have it made again"
            ) from None

    def _prefix(self, stage: str, unit: str) -> str:
        return f"{stage}/{self._file_name(stage, unit)}"

    def _record_name(self, stage: str, unit: str) -> str:
        return f"{self._prefix(stage, unit)}/record.json"

    def _url(self, stage: str, unit: str) -> str:
        return f"{self}/{self._prefix(stage, unit)}"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with lease(self.store):
            yield

    # small records

    def _read(self, name: str) -> bytes | None:
        return self.store.get(name)

    def _write(self, name: str, value: Any) -> None:
        self.store.put(name, _json(value))

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Now and then: every unit would be a request of its own."""
        now = time.monotonic()
        if now - self._last_progress >= SECONDS_BETWEEN_PROGRESS or progress.get("done") == progress.get("total"):
            self._last_progress = now
            super().write_progress(progress)

    def keep_answer(self, name: str, answer: Mapping[str, Any]) -> None:
        try:
            super().keep_answer(name, answer)
        except RequestError as error:  # a run that may only be read answers all the same
            raise OSError(errno.EACCES, str(error)) from None

    def answers(self) -> list[dict[str, Any]]:
        names = self.store.names("answers")
        contents = self.store.get_all(names)
        return [read_answer(contents[name], f"{self}/{name}") for name in names if name in contents]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
