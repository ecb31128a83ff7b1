"""A bank of retrained models: which training sequences each of them saw, and the loss of each query under it.

Knows arrays and their `.npz` files; knows nothing of how the models were trained. Legend: N training sequences, Q queries, S subsets, R seeds.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from influence.errors import RequestError
from influence.measurement import Measurement
from influence.run_directory import write_file
from influence.sequences import TrainingSequence

FEWEST_SUBSETS = 3
"""With two subsets every rank correlation is 1 or -1."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Retrained models. What the file they were read from does not say is None."""

    masks: NDArray[np.bool_]  # [S, N]: whether the sequence was in the subset
    losses: NDArray[np.float64]  # [R, S, Q]: of each query, summed over its counted tokens, in nats
    sequences: str | None = None  # `sequences_digest` of the training sequences
    queries: tuple[str, ...] | None = None  # `query_digest` of each query

    @property
    def num_seeds(self) -> int:
        return int(self.losses.shape[0])

    @property
    def num_subsets(self) -> int:
        return int(self.losses.shape[1])

    @property
    def num_queries(self) -> int:
        return int(self.losses.shape[2])

    def with_queries(self, columns: Sequence[int]) -> "Bank":
        """The same models with the losses of these queries only."""
        chosen = None if self.queries is None else tuple(self.queries[column] for column in columns)
        return replace(self, losses=self.losses[:, :, list(columns)], queries=chosen)


def read_bank(path: Path) -> Bank:
    """The bank in a `.npz` file with `masks` [S, N] and `query_losses` [R, S, Q] or [S, Q]. Nothing pickled is read.

    Raises RequestError when the file is no such bank, holds losses that are not finite, or fewer than three subsets.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            content = {name: file[name] for name in ("masks", "query_losses", "sequences", "queries") if name in file}
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise RequestError(f"{path} is not a bank of retrained models: expected an .npz file of plain arrays") from None
    for name in ("masks", "query_losses"):
        if name not in content:
            raise RequestError(
                f"{path} has no array {name!r}: a bank holds masks [subsets, sequences] and query_losses [seeds, subsets, queries]"
            )
    masks, losses = _checked_masks(path, content["masks"]), _checked_losses(path, content["query_losses"])
    if losses.shape[1] != len(masks):
        raise RequestError(
            f"{path}: masks are of {len(masks)} subsets and query_losses of {losses.shape[1]}: they must be of the same ones"
        )
    queries = tuple(map(str, content["queries"].ravel())) if "queries" in content else None
    if queries is not None and len(queries) != losses.shape[2]:
        raise RequestError(f"{path} names {len(queries)} queries, but has losses of {losses.shape[2]}: it is damaged")
    return Bank(masks=masks, losses=losses, sequences=str(content["sequences"]) if "sequences" in content else None, queries=queries)


def _checked_masks(path: Path, masks: NDArray[np.generic]) -> NDArray[np.bool_]:
    if masks.ndim != 2 or masks.size == 0:
        raise RequestError(f"{path}: masks have shape {list(masks.shape)}, expected [subsets, sequences]")
    if masks.dtype != np.bool_ and not (masks.dtype.kind in "iu" and bool(np.isin(masks, (0, 1)).all())):
        raise RequestError(f"{path}: masks must be true or false, or 1 or 0, for each sequence (they hold {masks.dtype})")
    if len(masks) < FEWEST_SUBSETS:
        raise RequestError(f"{path} has {len(masks)} subsets: a rank correlation over them needs at least {FEWEST_SUBSETS}")
    return masks.astype(np.bool_)


def _checked_losses(path: Path, losses: NDArray[np.generic]) -> NDArray[np.float64]:
    losses = losses[None] if losses.ndim == 2 else losses
    if losses.ndim != 3 or losses.size == 0:
        raise RequestError(f"{path}: query_losses have shape {list(losses.shape)}, expected [seeds, subsets, queries]")
    if losses.dtype.kind not in "iuf" or not bool(np.isfinite(losses).all()):
        raise RequestError(f"{path}: query_losses must be finite numbers")
    return losses.astype(np.float64)


def write_bank(path: Path, bank: Bank) -> None:
    """The bank as a `.npz` file that `read_bank` reads; it appears whole or not at all."""
    arrays: dict[str, NDArray[np.generic]] = {"masks": bank.masks, "query_losses": bank.losses}
    if bank.sequences is not None:
        arrays["sequences"] = np.array(bank.sequences)
    if bank.queries is not None:
        arrays["queries"] = np.array(bank.queries)
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # numpy's stub takes every keyword for allow_pickle
    write_file(path, content.getvalue())


def sequences_digest(sequences: Iterable[TrainingSequence]) -> str:
    """sha256 over the tokens of the training sequences and which of them are counted, in order."""
    total = hashlib.sha256()
    for sequence in sequences:
        _add(total, sequence)
    return f"sha256:{total.hexdigest()}"


def query_digest(measurement: Measurement) -> str:
    """sha256 over what a query measures: tokens, which of them are counted, and weights."""
    total = hashlib.sha256()
    for weight, sequence in measurement.parts:
        total.update(f"{weight} ".encode())
        _add(total, sequence)
    return f"sha256:{total.hexdigest()}"


def _add(total: "hashlib._Hash", sequence: TrainingSequence) -> None:
    total.update(len(sequence.tokens).to_bytes(8, "little"))
    total.update(sequence.tokens.astype("<i4").tobytes() + sequence.counted.tobytes())


def queries_in_bank(bank: Bank, measurements: Sequence[Measurement]) -> list[tuple[int, int]]:
    """(place among the measurements, column of the bank's losses) of the queries to evaluate.

    A bank that names its queries must hold every one that is given; one that does not holds losses of the first queries, in order, and
    the others are left out. Raises RequestError when the queries and the bank do not belong together.
    """
    if bank.queries is None:
        if len(measurements) < bank.num_queries:
            raise RequestError(
                f"the bank has losses of {bank.num_queries} queries without saying which, and {len(measurements)} are given: "
                "give all of them, in the bank's order"
            )
        return [(column, column) for column in range(bank.num_queries)]
    columns = {name: column for column, name in enumerate(bank.queries)}
    found = [(place, columns.get(query_digest(measurement))) for place, measurement in enumerate(measurements)]
    for place, column in found:
        if column is None:
            raise RequestError(
                f"query {place + 1} is not one of the {bank.num_queries} whose losses the bank has: other text, or other tokens"
            )
    return [(place, column) for place, column in found if column is not None]


def check_sequences(bank: Bank, sequences: Iterable[TrainingSequence], num_sequences: int) -> None:
    """Raises RequestError when the bank's models were trained on other sequences than these."""
    if bank.masks.shape[1] != num_sequences:
        raise RequestError(
            f"the bank's subsets are of {bank.masks.shape[1]:,} training sequences, but the run has {num_sequences:,}: "
            "they must be the same ones, in the same order"
        )
    if bank.sequences is not None and bank.sequences != sequences_digest(sequences):
        raise RequestError("the bank's models were trained on other sequences than the run's: it belongs to another run")
