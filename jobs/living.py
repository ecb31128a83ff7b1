"""A living index: sequences appended to a finished run, removed from its answers, and erased from its files. The factors stay as they were fitted.

Every change is prepared beside what is there and becomes visible by one rename (`influence/living.py`). Killed before that, it leaves the
old state, and the same command goes on where it was.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from influence.artifacts import appended_fingerprint
from influence.config import DataConfig, absolute
from influence.documents import data_fingerprint, read_documents
from influence.errors import RequestError
from influence.lexical import write_lexical
from influence.living import Appended, Living
from influence.run import Run, row_units
from influence.run_directory import digest
from influence.sequences import SequenceStore, tokenize, write_erased, write_sequences
from jobs.progress import bar, say
from jobs.stages import rows_of


def append(run: Run, files: Sequence[str]) -> dict[str, Any]:
    """Adds the files' sequences to the index. Raises RequestError when an id is in the run already, or the files are."""
    with run.directory.exclusive():
        living = run.directory.living
        config = DataConfig(**{**run.description["settings"]["data"], "files": [absolute(name) for name in files]})
        data = data_fingerprint(config)
        name = f"append-{digest([data, len(living.appended)]).removeprefix('sha256:')[:12]}"
        if any(part.data == data for part in living.appended):
            raise RequestError(f"these files were appended to {run.directory} before: nothing is to do")
        _discard(run, living, but=name)
        fingerprint = appended_fingerprint(run.fingerprints, data)
        if not run.directory.is_done("sequences", name, fingerprint):
            live = {identifier for number, identifier in enumerate(run.store.ids) if number not in living.removed}

            def write(directory: Path) -> None:
                documents = read_documents(config, first_number=_next_number(run))
                write_sequences(directory, tokenize(documents, run.tokenizer, config), config.sequences_per_shard, live)

            run.directory.write_unit("sequences", name, fingerprint, write)
        added = SequenceStore(run.directory.unit_path("sequences", name))
        with bar("rows of the appended sequences") as progress:
            for shard, unit in enumerate(row_units(name, added)):
                progress.advance(shard, added.num_shards)
                if not run.directory.is_done("rows", unit, fingerprint):
                    run.directory.write_unit("rows", unit, fingerprint, rows_of(run, added.shard(shard)))
            progress.advance(added.num_shards, added.num_shards)
        after = living.with_appended(Appended(name=name, data=data, num_sequences=len(added)))
        _write_lexical(run, after, (sequence.text for sequence in chain(run.store, added)))
        run.directory.write_living(after)
    if added.summary["num_left_out"]:
        say(f"left out {added.summary['num_left_out']} sequences without a counted token")
    return {"appended": len(added), "sequences": len(run.store) + len(added), "removed": len(after.removed)}


def _next_number(run: Run) -> int:
    """For documents without an id: one more than the greatest number that a document of the run has for its id."""
    return 1 + max((int(name) for name in run.store.documents if name.isdecimal()), default=-1)


def _discard(run: Run, living: Living, but: str) -> None:
    """Removes what a killed `append` left of other files."""
    known = {part.name for part in living.appended} | {but}
    for stage in ("sequences", "rows"):
        for path in (run.directory.path / stage).glob("append-*"):
            if path.name[: len(but)] not in known:
                shutil.rmtree(path)


def _write_lexical(run: Run, living: Living, texts: Iterable[str]) -> None:
    unit, fingerprint = living.lexical_unit, run.fingerprints["lexical"]
    if not run.directory.is_done("lexical", unit, fingerprint):
        run.directory.write_unit("lexical", unit, fingerprint, partial(write_lexical, texts=texts))


def read_ids(path: Path) -> list[str]:
    """Ids from a file: one a line, or jsonl with an `id`. Raises RequestError when it cannot be read or holds none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.startswith("{"):
            try:
                found.append(str(json.loads(line)["id"]))
            except (ValueError, KeyError):
                raise RequestError(f"{path}, line {number}: expected an id, or a JSON object with an id") from None
        elif line:
            found.append(line)
    if not found:
        raise RequestError(f"{path} holds no id")
    return found


def remove(run: Run, ids: Sequence[str]) -> dict[str, Any]:
    """Takes sequences out of every answer from now on, by their ids or those of their documents.

    Raises RequestError, and removes nothing, when an id is not in the run or no sequence would be left.
    """
    with run.directory.exclusive():
        living = run.directory.living
        by_id: dict[str, list[int]] = {}
        for number, names in enumerate(zip(run.store.ids, run.store.documents, strict=True)):
            for name in dict.fromkeys(names):
                by_id.setdefault(name, []).append(number)
        unknown = [name for name in ids if name not in by_id]
        if unknown:
            names = ", ".join(map(repr, unknown[:3])) + (", …" if len(unknown) > 3 else "")
            raise RequestError(f"{len(unknown)} of {len(ids)} ids are not in {run.directory} ({names}): nothing was removed")
        after = replace(living, removed=living.removed | {number for name in ids for number in by_id[name]})
        if len(after.removed) == len(run.store):
            raise RequestError(f"that would remove every sequence of {run.directory}: nothing was removed")
        run.directory.write_living(after)
    return {"removed_now": len(after.removed) - len(living.removed), "removed": len(after.removed), "sequences": len(run.store)}


def erase(run: Run) -> dict[str, Any]:
    """Takes the removed sequences' text, tokens, metadata and rows out of the run's files, and the kept answers that show them.

    Their ids stay, and so do the factors, to whose sums they contributed.
    """
    with run.directory.exclusive():
        living = run.directory.living
        pending = living.removed - living.erased
        if not pending:
            return {"erased_now": 0, "erased": len(living.erased), "sequences": len(run.store)}
        replaced, obsolete = dict(living.replaced), []
        for stage, unit, first, size in _units(run):
            own = {number - first for number in living.removed if first <= number < first + size}
            if not any(first <= number < first + size for number in pending):
                continue
            source, new = run.directory.unit_path(stage, unit), f"{unit}-erased-{digest(sorted(own)).removeprefix('sha256:')[:12]}"
            fingerprint = run.directory.fingerprint_of(stage, unit)
            if not run.directory.is_done(stage, new, fingerprint):
                write = write_erased if stage == "sequences" else _write_erased_rows
                run.directory.write_unit(stage, new, fingerprint, partial(write, source=source, erased=own))
            replaced[f"{stage}/{unit}"] = new
            obsolete.append(source)
        after = replace(living, erased=living.removed, replaced=replaced)
        texts = ("" if number in after.erased else sequence.text for number, sequence in enumerate(run.store))
        _write_lexical(run, after, texts)
        obsolete.append(run.directory.unit_path("lexical", living.lexical_unit))
        run.directory.write_living(after)
        run.directory.forget_answers({run.store.ids[number] for number in after.erased})
        for path in obsolete:
            shutil.rmtree(path)
    return {"erased_now": len(pending), "erased": len(after.erased), "sequences": len(run.store)}


def _units(run: Run) -> Iterator[tuple[str, str, int, int]]:
    """(stage, unit, number of its first sequence, how many) of all that holds sequences or rows."""
    living = run.directory.living
    sizes = [("all", len(run.training)), *((part.name, part.num_sequences) for part in living.appended)]
    first = 0
    for unit, size in sizes:
        yield "sequences", unit, first, size
        first += size
    for unit, start, end in zip(run.row_units, run.store.starts, run.store.starts[1:], strict=False):
        yield "rows", unit, int(start), int(end - start)


def _write_erased_rows(directory: Path, source: Path, erased: Collection[int]) -> None:
    for name in ("rows.npy", "self_influence.npy"):
        values = np.load(source / name, allow_pickle=False)
        values[sorted(erased)] = 0
        np.save(directory / name, values, allow_pickle=False)
