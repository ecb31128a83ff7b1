"""What travels with a run that is done elsewhere: its configuration, and files of this machine that are small enough.

A relative path is a place on this machine and travels; an absolute one is a place where the work is done. Knows nothing of Ray.
"""

import glob
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from influence.config import Config, is_local_model, is_url
from influence.errors import RequestError
from influence.stored_run import run_directory

TRAVELS_AT_MOST = 100 * 2**20
"""Bytes of a model and data together. Ray keeps what travels in its head's memory, and sends it to every node."""

CONFIG_FILE = "config.yaml"


def pack(config: Config, directory: Path) -> None:
    """Fills the empty directory with everything of this machine that the run needs, and its configuration in CONFIG_FILE.

    Within the directory, the configuration means there what `config` means here. Raises RequestError for what cannot work elsewhere.
    """
    _check_run_directory(config.run.dir)
    model, files = config.model, list(config.data.files)
    if not Path(model.name).is_absolute() and is_local_model(model.name):
        model = model.model_copy(update={"name": _take(_existing_model(model.name), directory, Path("model"), "model.name")})
    if model.adapter is not None and not Path(model.adapter).is_absolute() and is_local_model(model.adapter):
        taken_adapter = _take(_existing_model(model.adapter), directory, Path("adapter"), "model.adapter")
        model = model.model_copy(update={"adapter": taken_adapter})
    code, _, function = (model.flax or "").rpartition(":")
    if code.endswith(".py") and not Path(code).is_absolute():
        model = model.model_copy(update={"flax": f"{_take(_existing_code(code), directory, Path('code'), 'model.flax')}:{function}"})
    places = [list(_places(name, len(files) == 1)) for name in files]
    taken: list[str] = []
    for name, found in zip(files, places, strict=True):
        taken += [_take(path, directory, Path(f"data/{len(taken) + n}"), "data.files") for n, path in enumerate(found)] or [name]
    packed = config.model_copy(
        update={
            "model": model,
            "data": config.data.model_copy(update={"files": taken}),
            "resources": config.resources.model_copy(update={"address": None}),
        }
    )
    (directory / CONFIG_FILE).write_text(yaml.safe_dump(packed.model_dump(mode="json"), allow_unicode=True), encoding="utf-8")


def _check_run_directory(place: str) -> None:
    if is_url(place):
        run_directory(place)  # refuses one that cannot be
    elif not Path(place).is_absolute():
        raise RequestError(
            f"run.dir is {place}, a directory of this machine: give an absolute path on storage that all nodes of the cluster see, "
            "or s3://bucket/run or gs://bucket/run"
        )


def _existing_model(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise RequestError(f"there is no model directory at {name}; an absolute path is one on the cluster")
    return path


def _existing_code(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise RequestError(f"there is no file {name} for model.flax; an absolute path is one on the cluster")
    return path


def _places(name: str, alone: bool) -> Iterator[Path]:
    """The files and directories of this machine that one of data.files names; none when it is a place on the cluster or a hub data set."""
    path = Path(name).expanduser()
    if Path(name).is_absolute():
        return
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 (as the run itself reads it)
        if not matches:
            raise RequestError(f"no file matches {name}; an absolute path or glob is one on the cluster")
        yield from matches
    elif path.exists():
        yield path
    elif path.suffix or not alone:
        raise RequestError(f"no data file at {name}; an absolute path is one on the cluster")


def _take(path: Path, directory: Path, place: Path, key: str) -> str:
    """Copies a file or directory, without what is hidden, below `directory`. Returns its path from there; the name of a file stays as it is."""
    files = [path] if path.is_file() else [inner for inner in sorted(path.rglob("*")) if inner.is_file() and not _hidden(inner, path)]
    taken = sum(inner.stat().st_size for inner in (*files, *_files(directory)))
    if taken > TRAVELS_AT_MOST:
        raise RequestError(
            f"{key}: with {path}, {taken / 2**20:,.0f} MiB would travel with the job, and {TRAVELS_AT_MOST // 2**20} MiB may: "
            "put it on storage that all nodes of the cluster see, and give its absolute path there"
        )
    target = directory / place / path.name if path.is_file() else directory / place
    for inner in files:
        copy = target / inner.relative_to(path) if path.is_dir() else target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inner, copy)
    return f"./{target.relative_to(directory)}"


def _hidden(path: Path, above: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(above).parts)


def _files(directory: Path) -> Sequence[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
