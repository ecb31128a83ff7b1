"""The runs of a service: found by name, loaded when first asked, released when memory is short, opened again when they changed.

Only the engine's thread loads and releases. Other threads read what needs no model: texts, metadata, layers, coverage.
"""

import gc
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import ArrowException
from safetensors import SafetensorError

from indexing import held_bytes
from influence import artifacts
from influence.batches import factor_bytes
from influence.errors import RequestError
from influence.health import health_file, last_health
from influence.report import render_health, render_run
from influence.run import Run
from influence.run_directory import digest
from influence.run_facts import layer_facts, run_facts
from influence.sequences import encode_pair
from influence.service.errors import ServiceError, not_found, stale
from influence.service.settings import RUN_NAME, ServiceSettings
from influence.stored_run import run_directory

log = logging.getLogger("influence.service")

SKETCH_BYTES_PER_ROW = 776
LONGEST_EXAMPLE = 60
"""Characters of an example's completion."""
DRAWN_PER_EXAMPLE = 20
"""Training sequences that are looked at for one example: some were removed, or have no word to be cut at."""


@dataclass(kw_only=True)
class OpenedRun:
    """A run under its name."""

    name: str
    run: Run
    version: Any  # of run.json when it was opened
    loaded: bool = False
    checked: bool = False  # whether every file that a query needs has its checksum
    verified: set[tuple[Path, str]] = field(default_factory=set)  # (directory of a unit, its fingerprint) of those that had
    num_bytes: int = 0  # what it keeps in memory once it is loaded
    last_use: int = 0  # a counter of uses: the least is released first
    names: dict[str, str] = field(default_factory=dict)  # what to write for each path of this machine
    page: tuple[str, str] = ("", "")  # state of the index, and the page about the run as it was then
    making_page: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number by id of every sequence."""
        return {name: number for number, name in enumerate(self.run.store.ids)}

    @cached_property
    def documents(self) -> dict[str, list[int]]:
        """Numbers of each document's sequences."""
        found: dict[str, list[int]] = {}
        for number, names in enumerate(self.run.store.documents_in()):
            for name in names:
                found.setdefault(name, []).append(number)
        return found


class Catalog:
    """Which runs there are, and those that are open."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._opened: dict[str, OpenedRun] = {}
        self._lock = threading.Lock()
        self._uses = 0
        self._in_use: Counter[str] = Counter()  # how often each run is in use at this moment: work that stands aside uses its own too

    def names(self) -> list[str]:
        """The names of all runs that are served, in order."""
        found = set(self._settings.runs)
        if self._settings.runs_dir is not None:
            found |= {path.name for path in self._settings.runs_dir.iterdir() if self._in_runs_dir(path.name) is not None}
        return sorted(found)

    def places(self) -> dict[str, str]:
        """Where each of them is, by name."""
        found = {name: self._settings.runs.get(name) or self._in_runs_dir(name) for name in self.names()}
        return {name: place for name, place in found.items() if place is not None}  # one that was removed meanwhile is nowhere

    def __contains__(self, name: str) -> bool:
        return name in self._settings.runs or self._in_runs_dir(name) is not None

    def place(self, name: str) -> str:
        """Where the run of this name is. Raises 404 for any other name, whatever it looks like."""
        found = self._settings.runs.get(name) or self._in_runs_dir(name)
        if found is None:
            raise not_found(f"no run is called {name!r}")
        return str(found)

    def _in_runs_dir(self, name: str) -> str | None:
        if self._settings.runs_dir is None or not RUN_NAME.fullmatch(name):
            return None
        path = self._settings.runs_dir / name
        inside = path.resolve().parent == self._settings.runs_dir.resolve()  # a link may lead elsewhere
        return str(path) if inside and (path / "run.json").is_file() else None

    def opened(self, name: str) -> OpenedRun:
        """The run, opened but not necessarily loaded, as it is now on disk. Raises 404, or 409 when it cannot be served."""
        place = self.place(name)
        with self._lock:
            there = self._opened.get(name)
            with reading(name, {place: name}):
                changed = run_directory(place).version()
                if there is None or there.version != changed:
                    there = self._opened[name] = _open(name, Run(place, memory_budget=self._settings.memory_budget), changed)
                elif not there.run.is_current:
                    fresh = _open(name, there.run.opened_again(), changed)
                    fresh.loaded, fresh.num_bytes, fresh.last_use = there.loaded, there.num_bytes, there.last_use
                    fresh.verified = there.verified
                    there = self._opened[name] = fresh
                    log.info("run opened again", extra={"run": name})
            return there

    def loaded(self, name: str) -> OpenedRun:
        """The run with all that a query needs in memory; others are released when there is too little of it. For the engine's thread only.

        Raises 409 when a file of it is missing, damaged or made from something else; the file is named.
        """
        opened = self.opened(name)
        self._uses += 1
        opened.last_use = self._uses
        if not opened.checked:
            with reading(name, opened.names):
                _load(opened.run, opened.verified)
                opened.num_bytes = resident_bytes(opened.run)
            log.info("run loaded", extra={"run": name, "bytes": opened.num_bytes})
            opened.loaded = opened.checked = True
            self._release()
        return opened

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[dict[str, OpenedRun]]:
        """The runs of these names, loaded, none of which is released within. For the engine's thread only.

        Raises what `loaded` raises, 409 when a file turns out damaged within, and 422 when the runs do not fit into memory together. Beside work
        that stands aside one more may be loaded than fits, until that work is done.
        """
        self._in_use.update(names)
        try:
            opened = self._loaded_together(names)
            self._share_rest()
            yield opened
        except (OSError, ArrowException, SafetensorError) as error:  # of files that are read when they are needed
            raise _damaged(", ".join(names), error) from None
        finally:
            self._in_use.subtract(names)
            self._release()

    def _loaded_together(self, names: Sequence[str]) -> dict[str, OpenedRun]:
        opened: dict[str, OpenedRun] = {}
        needed = 0
        for place, name in enumerate(names):
            opened[name] = self.loaded(name)
            needed += opened[name].num_bytes
            if place and needed > self._settings.memory_budget:
                raise ServiceError(
                    422,
                    "refused",
                    f"also: {place + 1} of the {len(names)} runs need {needed / 2**30:.2f} GiB of memory together, and this service has "
                    f"{self._settings.memory_budget / 2**30:.2f} GiB for runs: average fewer",
                )
        return opened

    def _release(self) -> None:
        """Releases the least recently used runs until the rest fits; never the last used one, nor one in use."""
        with self._lock:
            loaded = sorted((one for one in self._opened.values() if one.loaded), key=lambda one: one.last_use)
            total = sum(one.num_bytes for one in loaded)
            released = []
            for one in loaded[:-1]:
                if total > self._settings.memory_budget and not self._in_use[one.name]:
                    total -= one.num_bytes
                    del self._opened[one.name]
                    released.append(one.name)
        for name in released:
            log.info("run released", extra={"run": name})
        if released:
            gc.collect()

    def _share_rest(self) -> None:
        """Lets loaded runs keep candidates' gradients, equally many bytes each, in half of what they leave of the memory budget, for batches need
        some too; and in no more than a quarter of the machine's memory, which the budget may exceed."""
        loaded = [one for one in list(self._opened.values()) if one.loaded]
        rest = max(0, self._settings.memory_budget - sum(one.num_bytes for one in loaded)) // 2
        rest = min(rest, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
        for one in loaded:
            one.run.kept_gradients.limit(rest // len(loaded))

    def is_loaded(self, name: str) -> bool:
        there = self._opened.get(name)
        return there is not None and there.loaded

    @property
    def num_loaded(self) -> int:
        return sum(one.loaded for one in list(self._opened.values()))

    @property
    def kept_bytes(self) -> int:
        """Of the gradients of candidates, over all loaded runs."""
        return sum(one.run.kept_gradients.num_bytes for one in list(self._opened.values()) if one.loaded)

    def state_of_index(self, name: str, *, refine: bool) -> str:
        """Changes whenever an answer of the run could; a refined one depends on the state of the optimizer too."""
        opened = self.opened(name)
        with reading(name, opened.names):
            run = opened.run
            optimizer = run.optimizer_digest if refine else None
            return digest([version("influence"), run.fingerprints["rows"], run.directory.living.to_json(), optimizer])

    def indexes(self, names: Sequence[str]) -> list[str]:
        """The fingerprint of each run's index, which only making it anew changes."""
        return [self.opened(name).run.fingerprints["rows"] for name in names]

    def erased(self, name: str) -> frozenset[str]:
        """Ids of the sequences that are erased from the run's files; nothing else is read of a run without any, nor of one that is not served.

        Raises 409 when they cannot be told.
        """
        if name not in self:
            return frozenset()
        place = self.place(name)
        with reading(name, {place: name}):
            numbers = run_directory(place).living.erased
        if not numbers:
            return frozenset()
        opened = self.opened(name)
        with reading(name, opened.names):
            return frozenset(opened.run.store.ids[number] for number in numbers)


@contextmanager
def reading(run: str, names: Mapping[str, str]) -> Iterator[None]:
    """Within it, whatever shows that a file of the run cannot be read raises 409."""
    try:
        yield
    except RequestError as error:
        raise stale(error, names) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(run, error) from None


def _damaged(run: str, error: Exception) -> ServiceError:
    log.error("run is damaged", exc_info=error, extra={"run": run})
    return ServiceError(
        409, "stale", f"a file of the run {run} is damaged ({type(error).__name__}): `influence status --verify` says which"
    )


def _open(name: str, run: Run, changed: Any) -> OpenedRun:
    path = str(run.directory)
    names = {path: name, str(run.model_config.name): f"the model of {name}"}
    return OpenedRun(name=name, run=run, version=changed, names=names)


def _load(run: Run, verified: set[tuple[Path, str]]) -> None:
    """Reads what queries need, after every file of it that was not `verified` before was checked against its checksum."""
    used = list(_used_units(run))
    for stage in dict.fromkeys(stage for stage, _, _ in used):
        run.directory.bring(stage, [unit for other, unit, _ in used if other == stage])
    for stage, unit, fingerprint in used:
        key = (run.path_of(stage, unit, fingerprint), fingerprint)
        if key not in verified:
            run.directory.verify(stage, unit)
            verified.add(key)
    for part in ("attributed", "index", "self_influence", "fidelity", "lexical"):
        getattr(run, part)
    run.factors_of(run.parts()[0])
    _ = run.store.ids


def _used_units(run: Run) -> Iterator[tuple[str, str, str]]:
    prints = run.fingerprints
    for stage in ("sequences", "lexical", "layers", "factors"):
        yield stage, "all", prints[stage]
    for part in run.appended:
        yield "sequences", part.name, artifacts.appended_fingerprint(prints, part.data)
    for name in sorted({name for layer in run.coverage.layers for name in (layer.input_name, layer.output_name) if name}):
        yield "eigenbases", name, prints["eigenbases"]
    for unit, fingerprint in run.row_units.items():
        yield "rows", unit, fingerprint
    if run.measures_fidelity:
        yield "fidelity", "all", prints["fidelity"]


def resident_bytes(run: Run) -> int:
    """What a loaded run keeps in memory: weights, factors and what makes rows of them, and the sketch of every row, normalized or not,
    or few sparse rows as they are."""
    rows = run.rows
    a_row = held_bytes(rows.format, rows.num_rows) or 2 * SKETCH_BYTES_PER_ROW
    weights = sum(p.numel() * p.element_size() for p in run.language_model.model.parameters())
    return weights + max(map(factor_bytes, run.layer_groups)) + a_row * rows.num_rows


def sequence_facts(opened: OpenedRun, name: str) -> dict[str, Any]:
    """A sequence by its id, with the ids of its document's. Raises 404 when there is none, or it was removed."""
    run = opened.run
    number, live = opened.numbers.get(name), run.live
    if number is None or not live[number]:
        raise not_found(f"no sequence of {opened.name} is called {name!r}")
    found = run.store[number]
    return {
        "id": name,
        "text": found.text,
        "metadata": found.metadata,
        "num_tokens": len(found.tokens),
        "document": found.document,
        "documents": [part.to_json() for part in found.parts],
        "sequences_of_document": [run.store.ids[other] for other in opened.documents[found.document] if live[other]],
    }


def layer_report(run: Run) -> dict[str, Any]:
    """Every attributed layer with its factors' figures, and what is left out."""
    return {"layers": layer_facts(run), "excluded": run.coverage.excluded, "parameters_attributed": run.coverage.share}


def run_page(opened: OpenedRun, state: str) -> str:
    """The page about the run, without paths of this machine; kept until the index is in another state. Raises 409 for a file that cannot be read."""
    with opened.making_page:
        if opened.page[0] != state:
            with reading(opened.name, opened.names):
                facts = run_facts(opened.run)
            told = facts["provenance"] | {"place": opened.name, "sources": {}}
            opened.page = (state, render_run(facts | {"run": opened.name, "created": date.today().isoformat(), "provenance": told}))
    return opened.page[1]


def health_summary(opened: OpenedRun) -> dict[str, Any]:
    """What `influence health` found and left in the run, without paths of this machine. Raises 404 when it left nothing, 409 when the run has
    changed since."""
    with reading(opened.name, opened.names):
        found = last_health(opened.run)
    if found is None:
        raise not_found(f"the health of {opened.name} was not measured: `influence health RUN` does it, and leaves it in the run")
    return found | {"run": opened.name, "provenance": found["provenance"] | {"run": opened.name}}


def health_page(opened: OpenedRun) -> str:
    """The page about the training set. Raises what `health_summary` raises."""
    return render_health(health_summary(opened))


def example_queries(run: Run, count: int, seed: int) -> list[dict[str, str]]:
    """Halves of training sequences, cut at a word, as prompt and completion; which ones depends on `seed` and their number alone.

    Of a small draw, so that nothing of the size of the run is made or kept for a seed; sequences that cannot be cut leave fewer than `count`.
    """
    found, live, total = [], run.live, len(run.training)
    for number in np.random.default_rng(seed).choice(total, min(total, DRAWN_PER_EXAMPLE * count), replace=False):
        text = run.training[int(number)].text if live[number] else ""
        cut = text.find(" ", len(text) // 2)
        if text[:cut].strip() and 0 < cut < len(text) - 1:
            end = min(len(text), cut + LONGEST_EXAMPLE)
            found.append({"sequence": run.training.ids[int(number)], "prompt": text[:cut], "completion": text[cut:end]})
        if len(found) == count:
            break
    return found


def question_tokens(run: Run, prompt: str, completion: str, most: int) -> dict[str, list[str]]:
    """The tokens of a question as texts, those of the completion being what a span counts. Raises 422 when they are more than `most`."""
    ids, inside = encode_pair(run.tokenizer, prompt, completion)
    if len(ids) > most:
        raise ServiceError(422, "refused", f"the query has {len(ids)} tokens, and this service allows at most {most}")
    texts = list(zip(run.token_texts(np.array(ids, np.int32)), inside, strict=True))
    return {"prompt": [text for text, within in texts if not within], "completion": [text for text, within in texts if within]}


def facts_of(catalog: Catalog, name: str, limits: dict[str, int]) -> dict[str, Any]:
    """What is served under this name; a run that cannot be served says why."""
    try:
        opened = catalog.opened(name)
        with reading(name, opened.names):
            return _facts(opened, catalog.is_loaded(name), limits)
    except ServiceError as error:
        if error.status == 404:
            raise
        return {"name": name, "state": "unusable", "error": error.message}


def _facts(opened: OpenedRun, loaded: bool, limits: dict[str, int]) -> dict[str, Any]:
    run = opened.run
    return {
        "name": opened.name,
        "state": "loaded" if loaded else "available",
        "sequences": int(run.live.sum()),
        "training_sequences": len(run.training),
        "metadata": run.description["settings"]["data"]["metadata"],
        "sequence_length": run.description["settings"]["data"]["sequence_length"],
        "damping": run.description["settings"]["factors"]["damping"],
        "coverage": {
            "parameters_attributed": run.coverage.share,
            "layers": len(run.coverage.layers),
            "excluded": run.coverage.excluded,
        },
        "fidelity": run.fidelity.to_json() if run.fidelity else None,
        "health": run.directory.is_local and health_file(run).is_file(),
        "fingerprints": run.description["fingerprints"],
        "limits": limits,
    }
