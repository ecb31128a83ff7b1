"""What a run is made of and how good it is, as JSON: its data, coverage, fit, spectra and damping, index, fidelity and self-influence.

Read from the run's files alone: neither the model nor the eigenvectors are loaded, and one layer's eigenvalues are in memory at a time. What
`influence status`, the service and the run's report say of a run is from here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from influence import artifacts
from influence.concentration import concentration
from influence.report import Report, render_run
from influence.report.layers import kind, take_apart
from influence.report.tables import run_tables
from influence.run_directory import STAGES

if TYPE_CHECKING:
    from influence.run import Run

STEPS_A_DECADE = 5
DECADES = 12
"""A spectrum is told at so many steps for each power of ten, over so many powers below its largest eigenvalue."""

ROWS_COUNTED = 500
"""Of so many sparse rows it is counted what they keep of which layer."""

MOST_VALUES = 30
"""Values of a metadata column that are counted by name; the others are counted together."""

LENGTH_BINS, SELF_INFLUENCE_BINS = 24, 40
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def run_facts(run: "Run") -> dict[str, Any]:
    """Everything that the report of a finished run shows. Raises RequestError when it is not finished."""
    live = run.live
    row_numbers = _row_numbers(run)
    return {
        "about": "run",
        "run": run.directory.name,
        "data": data_facts(run) | {"searched": int(live.sum()), "lengths": _lengths(run, live), "metadata": _metadata(run, live)},
        "living": living_facts(run),
        "coverage": coverage_facts(run),
        "fit": {"sequences": run.fitted_on, "of": len(run.training), "settings": run.description["settings"]["factors"]},
        "layers": [_with_spectrum(run, facts, row_numbers) for facts in layer_facts(run)],
        "index": _index_facts(run, row_numbers),
        "fidelity": json.loads(json.dumps(run.fidelity.to_json())) if run.fidelity else None,
        "rankings": _evaluated(run),
        "self_influence": _self_influence(run.self_influence[live]),
        "provenance": {
            "place": str(run.directory),
            "made_with": version("influence"),
            "fingerprints": run.description["fingerprints"] | {name: run.fingerprints[name] for name in ("factors", "rows")},
            "settings": run.description["settings"],
            "sources": run.description["sources"],
            "bytes": _sizes(run),
        },
    }


def run_report(run: "Run") -> Report:
    """The report of the run itself: what it is made of and how good it is. Raises RequestError when it is not finished."""
    content = run_facts(run) | {"created": date.today().isoformat()}
    return Report(title=f"Run {content['run']}", content=content, page=lambda: render_run(content), table_rows=lambda: run_tables(content))


def data_facts(run: "Run") -> dict[str, Any]:
    """Of the training sequences: how many there are and what they hold."""
    summary = run.training.summary
    return {"sequences": len(run.training), **{key: value for key, value in summary.items() if key != "shards"}}


def coverage_facts(run: "Run") -> dict[str, Any]:
    """Which layers are attributed, and what is left out and why."""
    coverage = run.coverage
    return {
        "parameters_attributed": coverage.share,
        "attributed": coverage.attributed,
        "parameters": coverage.total,
        "layers": [layer.name for layer in coverage.layers],
        "excluded": coverage.excluded,
        "whole": coverage.whole,
    }


def living_facts(run: "Run") -> dict[str, int]:
    """How many sequences were appended, removed and erased since the index was built."""
    changes = run.directory.living
    return {"appended": len(run.store) - len(run.training), "removed": len(changes.removed), "erased": len(changes.erased)}


def layer_facts(run: "Run") -> list[dict[str, Any]]:
    """Every attributed layer with its factors' figures: damping λ in nats², effective dimension Σ Λ/(Λ+λ), weight in rows Σ (Λ/(Λ+λ))²."""
    summary = artifacts.read_factor_summary(run.path_of("factors"))
    return [
        {
            "name": layer.name,
            "modules": list(layer.modules),
            "type": layer.kind,
            "kind": kind(layer.name),
            "block": take_apart(layer.name).block,
            "shape": list(layer.shape),
            "parameters": layer.shape[0] * layer.shape[1],
            **summary[layer.name],
        }
        for layer in run.coverage.layers
    ]


def _with_spectrum(run: "Run", facts: dict[str, Any], row_numbers: Mapping[str, float]) -> dict[str, Any]:
    buckets = {layer.name: layer.width for layer in run.features.layers}
    values, name = artifacts.read_corrected_eigenvalues(run.path_of("factors"), facts["name"]), facts["name"]
    return {**facts, "row_buckets": buckets[name], "row_numbers": row_numbers[name], "spectrum": spectrum(values, facts["damping"])}


def _row_numbers(run: "Run") -> dict[str, float]:
    """How many of a row's numbers are each layer's; of sparse rows on average over some."""
    layers = run.features.layers
    if run.features.mixed:
        return {layer.name: layer.width for layer in layers}
    kept = run.row_format.decode_sparse(run.rows.take(run.sample(None)[:ROWS_COUNTED]))
    counts = np.histogram(kept.indices, [*(layer.start for layer in layers), run.features.row_length])[0]
    return {layer.name: float(count / kept.shape[0]) for layer, count in zip(layers, counts, strict=True)}


def spectrum(eigenvalues: torch.Tensor, damping: float) -> dict[str, Any]:
    """How the eigenvalues Λ of a layer, of any shape, are spread, and what the damping λ does to them.

    `curve` holds [value, how many eigenvalues are at least that large], from the largest down by fifths of a power of ten, over twelve powers.
    `axes_below_damping` is the share of eigenvalues, `curvature_below_damping` the share of their sum, that belongs to those below λ.
    """
    values = eigenvalues.flatten()
    largest, total = float(values.max()), float(values.sum(dtype=torch.float64))
    below = values < damping
    curve: list[list[float]] = []
    if largest > 0:
        edges = (largest * 10 ** (-torch.arange(STEPS_A_DECADE * DECADES, -1, -1, dtype=torch.float64) / STEPS_A_DECADE)).to(values.dtype)
        edges[-1] = largest  # the power of zero is one, whatever rounding says
        bins = torch.bincount(torch.bucketize(values, edges, right=True, out_int32=True), minlength=len(edges) + 1)[1:]
        counts = bins.flip(0).cumsum(0)
        curve = [[float(edge), int(count)] for edge, count in zip(edges.flip(0), counts, strict=True)]
    return {
        "axes": values.numel(),
        "zero": int((values == 0).sum()),
        "largest": largest,
        "mean": total / values.numel(),
        "axes_below_damping": float(below.double().mean()),
        "curvature_below_damping": float(values[below].sum(dtype=torch.float64)) / total if total > 0 else 0.0,
        "curve": curve,
    }


def _index_facts(run: "Run", row_numbers: Mapping[str, float]) -> dict[str, Any]:
    config, fidelity = run.index_config, run.fidelity
    ends = {} if fidelity is None else {name: {str(k): end.candidates_for(k) for k in (1, 10, 100)} for name, end in fidelity.ends.items()}
    return {
        "encoding": config.encoding,
        "bytes_per_sequence": run.row_format.bytes_per_row,
        "numbers_per_row": round(sum(row_numbers.values())),
        "dimensions": sum(layer.shape[0] * layer.shape[1] for layer in run.coverage.layers),
        "candidates": ends,
    }


def _evaluated(run: "Run") -> dict[str, Any] | None:
    """What `influence evaluate RUN fidelity` measured with these factors, where that was done and its file is in the run directory."""
    path = run.directory.path / "evaluations" / "fidelity.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found) if found["provenance"]["factors"] == run.fingerprints["factors"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lengths(run: "Run", live: NDArray[np.bool_]) -> dict[str, Any]:
    """A histogram of the sequences' numbers of tokens; an edge belongs to the bin at its right, but for the last."""
    lengths = run.store.lengths[live]
    if not len(lengths):
        return {"edges": [], "counts": []}
    step = max(1, -(-int(np.ptp(lengths) + 1) // LENGTH_BINS))
    edges = np.arange(int(lengths.min()), int(lengths.max()) + step + 1, step)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def _metadata(run: "Run", live: NDArray[np.bool_]) -> dict[str, Any]:
    """By column: how many of the live sequences have each value, the most frequent first."""
    columns: dict[str, Counter[str]] = {name: Counter() for name in run.description["settings"]["data"]["metadata"]}
    for found, kept in zip(run.store.metadata(), live, strict=True):
        for name, counts in columns.items() if kept else ():
            value = found.get(name)
            counts["" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] += 1
    return {
        name: {
            "distinct": len(counts),
            "values": [{"value": value, "sequences": count} for value, count in counts.most_common(MOST_VALUES)],
            "others": sum(counts.values()) - sum(count for _, count in counts.most_common(MOST_VALUES)),
        }
        for name, counts in columns.items()
    }


def _self_influence(own: NDArray[np.float64]) -> dict[str, Any]:
    """How the self-influence of the live sequences is spread, in nats: a histogram with edges in equal steps of the logarithm, and quantiles."""
    positive = own[own > 0]
    facts: dict[str, Any] = {"unit": "nats", "zero": int((own <= 0).sum()), "edges": [], "counts": [], "quantiles": {}, "tail": []}
    if not len(positive):
        return facts
    low, high = float(positive.min()), float(positive.max())
    edges = np.geomspace(low, high if high > low else 1.01 * low, SELF_INFLUENCE_BINS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    spread = concentration(own)
    return facts | {
        "edges": edges.tolist(),
        "counts": np.histogram(positive, edges)[0].tolist(),
        "quantiles": {f"{share:g}": float(np.quantile(own, share)) for share in QUANTILES},
        "mean": float(own.mean()),
        "largest": high,
        **{key: spread[key] for key in ("num_sequences", "tail", "effective_sequences")},
    }


def _sizes(run: "Run") -> dict[str, int] | None:
    """Bytes on disk by stage; None for a run in an object store, of which a part is here."""
    if not run.directory.is_local:
        return None
    return {stage: sum(file.stat().st_size for file in _files(run.directory.path / stage)) for stage in STAGES}


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
