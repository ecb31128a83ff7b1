"""The run directory: the only thing that knows paths.

    run.json                            what the run is made of: configuration and fingerprints
    sequences/all/                      part-00000.parquet …, summary.json
    lexical/all/                        BM25 over the texts
    layers/all/                         the attributed layers, and what is not covered
    covariances/part-00000/             partial sums, safetensors, a file for each covariance
    eigenbases/<name>/                  one covariance's eigenvectors
    eigenvalues/part-00000/             partial sums, a file for each layer
    factors/all/                        corrected eigenvalues, a file for each layer, and damping
    rows/part-00000/                    rows.npy (bytes), self_influence.npy
    scans/part-00000/                   exact scores of sample queries
    fidelity/all/                       how close the index comes to them
    living.json                         what was appended and removed since, with units sequences/append-<id>, rows/append-<id>-00000 …
    answers/<id>.json                   results of queries
    evaluations/                        what `influence evaluate` measured; below retrained-<id>/ a unit for each retrained model
    evaluations/health/                 what `influence health` found, with texts; health-<id>/ holds a unit for each part of its passes
    progress.json                       what `influence status` shows of work under way

The output of a unit of work is a directory that appears whole, by one rename, with a `record.json` of its fingerprint and the size and
checksum of its files. "Not done", "done for something else" and "done" are three answers; only the last is ever read, and nothing is overwritten.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from influence.errors import RequestError
from influence.living import Living

FORMAT = 8
"""Version of the layout and of every file format in a run directory. Other versions are refused."""

STAGES = ("sequences", "lexical", "layers", "covariances", "eigenbases", "eigenvalues", "factors", "rows", "scans", "fidelity")


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


class RunDirectory:
    """Paths, records and locks of one run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._living: tuple[tuple[int, int], Living] | None = None  # (time and size of the file, content)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """Where the files are that are read and written here."""
        return self._path

    @property
    def name(self) -> str:
        """What people call the run: the last part of its place."""
        return self.path.name

    # what the run is made of

    def describe(self) -> dict[str, Any]:
        """The content of run.json. Raises RequestError when this is no run directory, or one of another version."""
        place = f"{self}/run.json"
        try:
            content = self._read("run.json")
            if content is None:
                raise RequestError(f"{self} is not a run directory: it has no run.json (`influence run` makes one)")
            description = json.loads(content)
        except ValueError as error:
            raise error if isinstance(error, RequestError) else RequestError(f"{place} is damaged: it is not JSON") from None
        except OSError as error:
            raise RequestError(f"{place} cannot be read: {error.strerror or error}") from None
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            version = description.get("format") if isinstance(description, dict) else None
            raise RequestError(f"{self} has run-directory format {version}, this version reads format {FORMAT}: use another directory")
        missing = [key for key in ("settings", "fingerprints", "sources") if not isinstance(description.get(key), dict)]
        if missing:
            raise RequestError(f"{place} is damaged: it has no {missing[0]}")
        return description

    def version(self) -> object:
        """Differs once run.json was written anew."""
        try:
            facts = (self.path / "run.json").stat()
        except FileNotFoundError:
            return None
        return (facts.st_mtime_ns, facts.st_size, facts.st_ino)

    def create(self, description: Mapping[str, Any], stage_fingerprints: Callable[[Mapping[str, Any]], Mapping[str, str]]) -> None:
        """Writes run.json, or checks that the one that is there has the same settings and fingerprints.

        Places ("sources") may differ: a model or data set that moved is still the same. Settings and data may change as long as everything
        that is done would be done again just so (`stage_fingerprints` tells), such as after a first attempt that found a broken line.
        Raises RequestError naming the first thing that differs.
        """
        description = {"format": FORMAT, **description}
        if self._begin(description):
            return
        found = self.describe()
        fixed = ("format", "settings", "fingerprints")
        differences = _differences({key: found.get(key) for key in fixed}, {key: description.get(key) for key in fixed})
        if not differences:
            if found["sources"] != description["sources"]:
                with self.exclusive():
                    self._write("run.json", {**found, **description})
            return
        before, now = stage_fingerprints(found), stage_fingerprints(description)
        if all(before[stage] == now[stage] for stage in STAGES if self._has_units(stage)):
            with self.exclusive():
                self._write("run.json", {**found, **description})
            return
        key, (made_with, wanted) = min(differences.items())
        raise RequestError(
            f"{self} was made with {key} = {_short(made_with)}, and this run has {_short(wanted)}: "
            "take a new run directory, or restore what the run was made from"
        )

    def _begin(self, description: Mapping[str, Any]) -> bool:
        """Writes run.json unless there is one; whether it did."""
        if (self.path / "run.json").exists():
            return False
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self} is a file: the run directory must be a directory, or not there yet")
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_not_foreign()
        self._write("run.json", description)
        return True

    def _check_not_foreign(self) -> None:
        foreign = [stage for stage in STAGES if self._has_units(stage)]
        if foreign:
            raise RequestError(f"{self} has {foreign[0]}/ but no run.json: it is not a whole run directory; use another one")

    def _has_units(self, stage: str) -> bool:
        return bool(self.unit_names(stage))

    is_local = True
    """Whether its files are on a disk, so that others may be kept beside them."""

    def check_changeable(self) -> None:
        """Raises RequestError where files that are there cannot be replaced in one step, as an append or a removal does."""

    def check_keeps_files(self, option: str) -> None:
        """Raises RequestError where files for people, such as a report, must go elsewhere, as `option` can say."""

    # what changed since

    @property
    def living(self) -> Living:
        """What was appended and removed since the index was built, as of now. Raises RequestError when the file that tells is damaged."""
        path = self.path / "living.json"
        try:
            facts = path.stat()
        except FileNotFoundError:
            return Living()
        version = (facts.st_mtime_ns, facts.st_size)
        if self._living is None or self._living[0] != version:
            self._living = (version, Living.from_json(path.read_bytes(), str(path)))
        return self._living[1]

    def write_living(self, living: Living) -> None:
        """Readers see the state before or after, never a part."""
        self._write("living.json", living.to_json())

    # units of work

    def unit_path(self, stage: str, unit: str) -> Path:
        return self._place(stage, unit)

    def _place(self, stage: str, unit: str) -> Path:
        return self.path / stage / self._file_name(stage, unit)

    def _file_name(self, stage: str, unit: str) -> str:
        return file_name(self.living.replaced.get(f"{stage}/{unit}", unit))

    def bring(self, stage: str, units: Sequence[str]) -> None:
        """Makes files of units that are done, so that asking for their paths one by one takes no time; here they are."""

    def unit_names(self, stage: str) -> list[str]:
        """What is there of a stage, by the names of its units' directories."""
        return sorted(path.name for path in (self.path / stage).glob("[!.]*"))

    def missing(self, stage: str, units: Sequence[str], fingerprint: str) -> list[str]:
        """Those of the units that are not done."""
        return [unit for unit in units if not self.is_done(stage, unit, fingerprint)]

    def is_done(self, stage: str, unit: str, fingerprint: str) -> bool:
        """Whether the unit's output is there and whole. Raises RequestError when it was made from something else or is damaged."""
        path = self._place(stage, unit)
        if not path.exists():
            return False
        try:
            record = json.loads((path / "record.json").read_text(encoding="utf-8"))
            files, made_from = {name: int(facts["bytes"]) for name, facts in record["files"].items()}, record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(
                f"{path} is damaged: its record.json is missing or unreadable; delete {path} to have it made again"
            ) from None
        if made_from != fingerprint:
            raise RequestError(
                f"{path} was made from something else (its fingerprint is {made_from}, expected {fingerprint}); use a new run directory"
            )
        for name, expected in files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != expected:
                state = "is missing" if size is None else f"is damaged: {size:,} bytes"
                raise RequestError(f"{path / name} {state}, expected {expected:,} bytes; delete {path} to have it made again")
        return True

    def fingerprint_of(self, stage: str, unit: str) -> str:
        """What a finished unit was made from."""
        record = json.loads((self.unit_path(stage, unit) / "record.json").read_text(encoding="utf-8"))
        return str(record["fingerprint"])

    def verify(self, stage: str, unit: str) -> None:
        """Raises RequestError when a file of the unit does not have its checksum."""
        path = self.unit_path(stage, unit)
        for name, facts in json.loads((path / "record.json").read_text(encoding="utf-8"))["files"].items():
            if file_digest(path / name) != facts["sha256"]:
                raise RequestError(f"{path / name} is damaged: its checksum differs from its record; delete {path} to have it made again")

    def write_unit(self, stage: str, unit: str, fingerprint: str, write: Callable[[Path], None]) -> None:
        """Has `write` fill an empty directory, which then becomes the unit's output in one step. Nothing stays behind on failure.

        When the unit was finished by somebody else meanwhile, theirs is kept: equal work gives equal output.
        """
        final = self._place(stage, unit)
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=final.parent))
        try:
            write(scratch)
            files = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(scratch.iterdir())}
            write_json(scratch / "record.json", {"fingerprint": fingerprint, "files": files})
            self._publish(scratch, stage, unit, fingerprint)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, scratch: Path, stage: str, unit: str, fingerprint: str) -> None:
        """Makes a filled directory beside it the unit's output, unless there is one already."""
        final = self._place(stage, unit)
        for path in scratch.iterdir():
            _sync(path)
        scratch.chmod(0o755)
        try:
            scratch.rename(final)
        except OSError:
            if not self.is_done(stage, unit, fingerprint):
                raise
        _sync(final.parent)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the right to work on this run, and first clears what a killed process left half-written.

        Raises RequestError when another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise RequestError(
                    f"another process is working on {self.path} ({lock.read().strip() or 'unknown'}); wait for it or stop it"
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            for place in (*STAGES, "evaluations/*"):
                for left in self.path.glob(f"{place}/.partial-*"):
                    shutil.rmtree(left, ignore_errors=True)
            yield

    # small records

    def _read(self, name: str) -> bytes | None:
        """The content of a small record; None when there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def _write(self, name: str, value: Any) -> None:
        """Writes a small record. Readers see the old one or the new, never a part."""
        (self.path / name).parent.mkdir(exist_ok=True)
        write_json(self.path / name, value)

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        self._write("progress.json", progress)

    def read_progress(self) -> dict[str, Any] | None:
        try:
            progress = json.loads(self._read("progress.json") or b"null")
        except (OSError, ValueError):
            return None
        return progress if isinstance(progress, dict) else None

    def keep_answer(self, name: str, answer: Mapping[str, Any]) -> None:
        self._write(f"answers/{file_name(name)}.json", answer)

    def forget_answers(self, ids: Collection[str]) -> None:
        """Removes the kept answers, the reports and the health that may show these sequences, and what killed processes left of others."""
        for left in (*(self.path / "answers").glob(".*"), *self.path.glob(".report*")):
            left.unlink(missing_ok=True)
        for path in (self.path / "answers").glob("*.json"):
            answer = read_answer(path.read_bytes(), str(path))
            shown = [*answer.get("results", []), *(answer.get("bm25") or {}).get("results", [])]
            if any(one["id"] in ids or any(other["id"] in ids for other in one.get("duplicates", [])) for one in shown):
                path.unlink()
        for page in self.path.glob("report*.html"):
            page.unlink(missing_ok=True)
        for path in self.path.glob("evaluations/health*"):
            shutil.rmtree(path)

    def answers(self) -> list[dict[str, Any]]:
        """The kept answers, oldest first."""
        paths = sorted((self.path / "answers").glob("[!.]*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [read_answer(path.read_bytes(), str(path)) for path in paths]


def read_answer(content: bytes, where: str) -> dict[str, Any]:
    """Raises RequestError when the content is not what `keep_answer` writes."""
    try:
        answer = json.loads(content)
        if isinstance(answer, dict) and isinstance(answer.get("query"), dict):
            return answer
    except ValueError:
        pass
    raise RequestError(f"{where} is damaged: it is not a kept answer; delete it and ask again")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that readers see the old content or the new, never a part."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=1, sort_keys=False).encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the old content or the new, never a part."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).rename(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(unit: str) -> str:
    """A unit's name as a file name: only letters, digits and `._-` stay as they are, so that no name leaves its directory."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in unit)
    if safe == unit and not unit.startswith(".") and len(unit) <= 150:
        return unit
    return f"{safe.lstrip('.')[:100]}-{hashlib.sha256(unit.encode()).hexdigest()[:12]}"


def _differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in before | now:
            found |= _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return {} if before == now else {prefix: (before, now)}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
