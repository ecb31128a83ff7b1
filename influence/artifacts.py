"""What the stages make, as files: safetensors for covariances, eigenbases, eigenvalues and factors, JSON for layers; and their fingerprints.

Every fingerprint contains those of what came before it, so that nothing made from something else passes for what is wanted.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ekfac import Covariance, Coverage, Eigenbasis, EigenvalueSum, Layer, LayerFactors, of
from influence.run_directory import FORMAT, digest, file_name


def stage_fingerprints(description: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint that each stage's output must carry, from the content of run.json."""
    settings, made_from = description["settings"], description["fingerprints"]
    index = {key: value for key, value in settings["index"].items() if key != "recall_queries"}
    damping = settings["factors"]["damping"]
    fitted_with = {key: value for key, value in settings["factors"].items() if key != "damping"}
    prints = {"sequences": digest([FORMAT, "sequences", settings["data"], made_from["data"], made_from["tokenizer"]])}
    split = [settings["factors"]["split_layers"]] if "split_layers" in settings["factors"] else []
    prints["layers"] = digest([FORMAT, "layers", settings["model"], made_from["model"], settings["factors"]["layers"], *split])
    prints["covariances"] = digest(["covariances", prints["sequences"], prints["layers"], fitted_with])
    prints["eigenbases"] = digest(["eigenbases", prints["covariances"]])
    prints["eigenvalues"] = digest(["eigenvalues", prints["eigenbases"]])
    prints["factors"] = digest(["factors", prints["eigenvalues"], damping])
    prints["rows"] = digest(["rows", prints["factors"], index])
    prints["scans"] = digest(["scans", prints["rows"], settings["index"]["recall_queries"]])
    prints["fidelity"] = digest(["fidelity", prints["scans"]])
    prints["lexical"] = digest(["lexical", prints["sequences"]])
    return prints


def appended_fingerprint(prints: Mapping[str, str], data: str) -> str:
    """What units of sequences and rows that were appended later must carry; `data` is the fingerprint of the files they came from."""
    return digest(["appended", prints["sequences"], prints["rows"], data])


def write_layers(directory: Path, coverage: Coverage) -> None:
    layers = [{key: value for key, value in asdict(layer).items() if value is not None} for layer in coverage.layers]
    content = {**asdict(coverage), "layers": layers}
    (directory / "layers.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_layers(directory: Path) -> Coverage:
    content = json.loads((directory / "layers.json").read_text(encoding="utf-8"))
    layers = tuple(
        Layer(**{**layer, "modules": tuple(layer["modules"]), **{side: _ranges(layer.get(side)) for side in ("rows", "columns")}})
        for layer in content["layers"]
    )
    return Coverage(**{**content, "layers": layers})


def _ranges(found: list[list[int]] | None) -> tuple[tuple[int, int], ...] | None:
    return None if found is None else tuple((first, end) for first, end in found)


def write_covariances(directory: Path, covariances: Mapping[str, Covariance]) -> None:
    for name, part in covariances.items():
        _save({"total": part.total}, _file_of(directory, name), int(part.num_positions))


def read_covariance(directory: Path, name: str) -> Covariance | None:
    """The partial sum of one covariance; None when this part of the data held no sequence to fit on."""
    path = _file_of(directory, name)
    return Covariance(**_read_sum(path, "num_positions")) if path.exists() else None


def write_eigenbasis(directory: Path, basis: Eigenbasis) -> None:
    _save({"values": basis.values, "vectors": basis.vectors}, directory / "eigenbasis.safetensors")


def read_eigenvectors(directory: Path) -> torch.Tensor:
    with safe_open(directory / "eigenbasis.safetensors", framework="pt") as file:
        vectors: torch.Tensor = file.get_tensor("vectors")
    return vectors


def write_eigenvalues(directory: Path, sums: Mapping[str, EigenvalueSum]) -> None:
    for name, part in sums.items():
        _save({"total": part.total}, _file_of(directory, name), part.num_sequences)


def read_eigenvalues(directory: Path, name: str) -> EigenvalueSum | None:
    """The partial sum of one layer; None when this part of the data held no sequence to fit on."""
    path = _file_of(directory, name)
    return EigenvalueSum(**_read_sum(path, "num_sequences")) if path.exists() else None


def write_factors(directory: Path, factors: Iterable[tuple[str, LayerFactors]]) -> None:
    """The corrected eigenvalues and λ of every layer, one layer in memory at a time; the eigenvectors stay where they are."""
    summary = {}
    for name, factor in factors:
        _save({"eigenvalues": factor.eigenvalues}, _file_of(directory, name))
        summary[name] = {
            "damping": factor.damping,
            "effective_dimension": factor.effective_dimension(),
            "row_weight": factor.row_weight(),
        }
    (directory / "factors.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def read_factor_summary(directory: Path) -> dict[str, dict[str, float]]:
    """λ, effective dimension and weight in rows of every layer."""
    summary: dict[str, dict[str, float]] = json.loads((directory / "factors.json").read_text(encoding="utf-8"))
    return summary


def read_corrected_eigenvalues(directory: Path, name: str) -> torch.Tensor:
    """Λ [O, J] of one layer, from the directory of the factors."""
    return load_file(_file_of(directory, name))["eigenvalues"]


def read_factors(directory: Path, bases: Mapping[str, torch.Tensor], devices: Mapping[Layer, torch.device]) -> dict[str, LayerFactors]:
    """The factors of the layers, each on its device; `bases` are the eigenvectors by `input_name` and `output_name`, already there."""
    summary = read_factor_summary(directory)
    return {
        layer.name: LayerFactors(
            input_vectors=of(bases, layer.input_name),
            output_vectors=of(bases, layer.output_name),
            eigenvalues=read_corrected_eigenvalues(directory, layer.name).to(device),
            damping=summary[layer.name]["damping"],
        )
        for layer, device in devices.items()
    }


def _file_of(directory: Path, name: str) -> Path:
    """A layer's or a covariance's own file, so that no more than one needs to be in memory, whichever were computed together."""
    return directory / f"{file_name(name)}.safetensors"


def _save(tensors: Mapping[str, torch.Tensor], path: Path, count: int | None = None) -> None:
    metadata = None if count is None else {"count": str(count)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def _read_sum(path: Path, counted: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {"total": file.get_tensor("total"), counted: int(file.metadata()["count"])}
