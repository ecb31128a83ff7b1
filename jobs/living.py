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
from influence.documents import Document, data_fingerprint, read_documents
from influence.errors import RequestError
from influence.lexical import write_lexical
from influence.living import Appended, Living
from influence.run import Run, row_units
from influence.run_directory import digest
from influence.sequences import tokenize, write_erased, write_sequences
from jobs.driver import stage_states, told_left_out
from jobs.progress import bar, say
from jobs.stages import rows_of


def append(run: Run, files: Sequence[str]) -> dict[str, Any]:
    """Adds the files' sequences to the index. Raises RequestError when an id is in the run already, or the files are."""
    run.directory.check_changeable()
    with run.directory.exclusive():
        run = _as_it_is_now(run)
        living = run.directory.living
        config = DataConfig(**{**run.description["settings"]["data"], "files": [absolute(name) for name in files]})
        data = data_fingerprint(config)
        name = f"append-{digest([data, len(living.appended)]).removeprefix('sha256:')[:12]}"
        _check_new(run, living, data)
        fingerprint = appended_fingerprint(run.fingerprints, data)
        if not run.directory.is_done("sequences", name, fingerprint):
            names = _names(run)
            taken = {identifier for number, own in enumerate(names) if number not in living.removed for identifier in own}

            def write(directory: Path) -> None:
                documents = read_documents(config, first_number=_next_number(names))
                sequences = tokenize(_not_taken(documents, taken), run.tokenizer, config)
                if config.documents == "pack":  # their ids are numbers of their own
                    sequences = (replace(sequence, id=f"{name}:{sequence.id}") for sequence in sequences)
                write_sequences(directory, sequences, config.sequences_per_shard, taken, keep_text=config.keep_text)

            run.directory.write_unit("sequences", name, fingerprint, write)
        _clear(run, but=name)
        added = run.store_of(run.directory.unit_path("sequences", name))
        with bar("rows of the appended sequences") as progress:
            for shard, unit in enumerate(row_units(name, added)):
                progress.advance(shard, added.num_shards)
                if not run.directory.is_done("rows", unit, fingerprint):
                    run.directory.write_unit("rows", unit, fingerprint, rows_of(run, added.shard(shard)))
            progress.advance(added.num_shards, added.num_shards)
        after = living.with_appended(Appended(name=name, data=data, num_sequences=len(added)))
        run.directory.write_living(_with_lexical(run, after, (sequence.text for sequence in chain(run.store, added))))
    if left_out := told_left_out(added.summary):
        say(left_out)
    return {"appended": len(added), "sequences": len(run.store) + len(added), "removed": len(after.removed)}


def _as_it_is_now(run: Run) -> Run:
    """The run opened again under its lock, for it may have changed since the caller opened it. Raises RequestError when it is not finished."""
    now = Run(run.directory.path, model=run.model_config.name, memory_budget=run.memory_budget)
    for stage, state in stage_states(now).items():
        if state["done"] != state["total"]:
            raise RequestError(
                f"{run.directory} is not finished: {stage} is missing or incomplete; `influence run` goes on where it stopped"
            )
    return now


def _check_new(run: Run, living: Living, data: str) -> None:
    """Refuses files that are in the index already, unless all their sequences were removed."""
    parts = [(run.description["fingerprints"]["data"], len(run.training)), *((part.data, part.num_sequences) for part in living.appended)]
    first = 0
    for known, size in parts:
        if known == data and not living.removed.issuperset(range(first, first + size)):
            raise RequestError(f"these files are in {run.directory} already: there is nothing to do")
        first += size


def _names(run: Run) -> list[tuple[str, ...]]:
    """Of every sequence: its id and those of the documents in it."""
    return [(name, *others) for name, others in zip(run.store.ids, run.store.documents_in(), strict=True)]


def _next_number(names: Iterable[tuple[str, ...]]) -> int:
    """For documents without an id: one more than the greatest number that is an id in the run."""
    return 1 + max((int(name) for own in names for name in own if name.isdecimal()), default=-1)


def _not_taken(documents: Iterable[Document], taken: Collection[str]) -> Iterator[Document]:
    """The documents. A sequence's own id does not tell: cut into another number of sequences, a document gives them other ids."""
    for document in documents:
        if document.id in taken:
            raise RequestError(f"the id {document.id!r} is in the run already: remove it first to replace it, or take another id")
        yield document


def _clear(run: Run, but: str | None = None) -> None:
    """Removes what is no part of the index: what a killed command left and what was replaced; all but what an `append` of that name left."""
    kept = {run.directory.unit_path(stage, unit) for stage, unit, _, _ in _units(run)} | {run.directory.unit_path("lexical", "all")}
    for stage in ("sequences", "rows", "lexical"):
        for path in (run.directory.path / stage).glob("[!.]*"):
            if path not in kept and not (but and path.name.startswith(but)):
                # Out of sight in one step: half of a unit under its own name would pass for a damaged one.
                shutil.rmtree(path.rename(path.with_name(f".partial-{path.name}")))


def _with_lexical(run: Run, after: Living, texts: Iterable[str]) -> Living:
    """The state `after`, with a lexical index of these texts in place of the one there is."""
    unit, fingerprint = after.lexical_unit, run.fingerprints["lexical"]
    if not run.directory.is_done("lexical", unit, fingerprint):
        run.directory.write_unit("lexical", unit, fingerprint, partial(write_lexical, texts=texts))
    return replace(after, replaced={**after.replaced, "lexical/all": unit})


def read_ids(path: Path) -> list[str]:
    """Ids from a file: one a line, or jsonl with an `id`. Raises RequestError when it cannot be read or holds none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
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
    run.directory.check_changeable()
    with run.directory.exclusive():
        run = _as_it_is_now(run)
        living = run.directory.living
        by_id: dict[str, list[int]] = {}
        for number, names in enumerate(_names(run)):
            for name in dict.fromkeys(names):
                by_id.setdefault(name, []).append(number)
        unknown = [name for name in ids if name not in by_id]
        if unknown:
            some = ", ".join(map(repr, unknown[:3])) + (", …" if len(unknown) > 3 else "")
            raise RequestError(f"{len(unknown)} of {len(ids)} ids are not in {run.directory} ({some}): nothing was removed")
        after = replace(living, removed=living.removed | {number for name in ids for number in by_id[name]})
        if len(after.removed) == len(run.store):
            raise RequestError(f"that would remove every sequence of {run.directory}: nothing was removed")
        run.directory.write_living(after)
    return {"removed_now": len(after.removed) - len(living.removed), "removed": len(after.removed), "sequences": len(run.store)}


def erase(run: Run) -> dict[str, Any]:
    """Takes the removed sequences' text, tokens, metadata and rows out of the run's files, and the kept answers that show them.

    Their ids stay, and so do the factors, to whose sums they contributed.
    """
    run.directory.check_changeable()
    with run.directory.exclusive():
        run = _as_it_is_now(run)
        living = run.directory.living
        pending = living.removed - living.erased
        if pending:
            after = _prepare_erased(run, living, pending)
            run.directory.forget_answers({run.store.ids[number] for number in pending})
            run.directory.write_living(after)
        _clear(run)
    return {"erased_now": len(pending), "erased": len(living.removed), "sequences": len(run.store)}


def _prepare_erased(run: Run, living: Living, pending: Collection[int]) -> Living:
    """Writes the units that hold a pending sequence once more, without the removed ones. Returns the state in which these are the index."""
    replaced = dict(living.replaced)
    for stage, unit, first, size in _units(run):
        own = {number - first for number in living.removed if first <= number < first + size}
        if not any(first <= number < first + size for number in pending):
            continue
        source, new = run.directory.unit_path(stage, unit), f"{unit}-erased-{digest(sorted(own)).removeprefix('sha256:')[:12]}"
        fingerprint = run.directory.fingerprint_of(stage, unit)
        if not run.directory.is_done(stage, new, fingerprint):
            keep_text = bool(run.description["settings"]["data"]["keep_text"])
            write = partial(write_erased, keep_text=keep_text) if stage == "sequences" else _write_erased_rows
            run.directory.write_unit(stage, new, fingerprint, partial(write, source=source, erased=own))
        replaced[f"{stage}/{unit}"] = new
    after = replace(living, erased=living.removed, replaced=replaced)
    return _with_lexical(run, after, ("" if number in after.erased else sequence.text for number, sequence in enumerate(run.store)))


def _units(run: Run) -> Iterator[tuple[str, str, int, int]]:
    """(stage, unit, number of its first sequence, how many) of all that holds sequences or rows."""
    living = run.directory.living
    sizes = [("all", len(run.training)), *((part.name, part.num_sequences) for part in living.appended)]
    first = 0
    for unit, size in sizes:
        yield "sequences", unit, first, size
        first += size
    for row_unit, start, end in zip(run.row_units, run.store.starts, run.store.starts[1:], strict=False):
        yield "rows", row_unit, int(start), int(end - start)


def _write_erased_rows(directory: Path, source: Path, erased: Collection[int]) -> None:
    for name in ("rows.npy", "self_influence.npy"):
        values = np.load(source / name, allow_pickle=False)
        values[sorted(erased)] = 0
        np.save(directory / name, values, allow_pickle=False)
