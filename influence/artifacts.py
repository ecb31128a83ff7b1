"""What the stages make, as files: safetensors for covariances, eigenbases, eigenvalues and factors, JSON for layers; and their fingerprints.

Every fingerprint contains those of what came before it, so that nothing made from something else passes for what is wanted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ekfac import Covariance, Coverage, Eigenbasis, EigenvalueSum, Layer, LayerFactors, of
from influence.run_directory import FORMAT, digest


def stage_fingerprints(description: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint that each stage's output must carry, from the content of run.json."""
    settings, made_from = description["settings"], description["fingerprints"]
    index = {key: value for key, value in settings["index"].items() if key != "recall_queries"}
    damping = settings["factors"]["damping"]
    fitted_with = {key: value for key, value in settings["factors"].items() if key != "damping"}
    prints = {"sequences": digest([FORMAT, "sequences", settings["data"], made_from["data"], made_from["tokenizer"]])}
    prints["layers"] = digest([FORMAT, "layers", settings["model"], made_from["model"], settings["factors"]["layers"]])
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
    content = {**asdict(coverage), "layers": [asdict(layer) for layer in coverage.layers]}
    (directory / "layers.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_layers(directory: Path) -> Coverage:
    content = json.loads((directory / "layers.json").read_text(encoding="utf-8"))
    layers = tuple(Layer(**{**layer, "modules": tuple(layer["modules"])}) for layer in content["layers"])
    return Coverage(**{**content, "layers": layers})


def write_covariances(directory: Path, covariances: Mapping[str, Covariance]) -> None:
    counts = {name: int(part.num_positions) for name, part in covariances.items()}
    _save({name: part.total for name, part in covariances.items()}, directory / "covariances.safetensors", counts)


def read_covariance(directory: Path, name: str) -> Covariance | None:
    """The partial sum of one covariance; None when this part of the data held no sequence to fit on."""
    with safe_open(directory / "covariances.safetensors", framework="pt") as file:
        counts = _counts(file)
        return Covariance(total=file.get_tensor(name), num_positions=counts[name]) if name in counts else None


def write_eigenbasis(directory: Path, basis: Eigenbasis) -> None:
    _save({"values": basis.values, "vectors": basis.vectors}, directory / "eigenbasis.safetensors", {})


def read_eigenvectors(directory: Path) -> torch.Tensor:
    with safe_open(directory / "eigenbasis.safetensors", framework="pt") as file:
        vectors: torch.Tensor = file.get_tensor("vectors")
    return vectors


def write_eigenvalues(directory: Path, sums: Mapping[str, EigenvalueSum]) -> None:
    counts = {name: part.num_sequences for name, part in sums.items()}
    _save({name: part.total for name, part in sums.items()}, directory / "eigenvalues.safetensors", counts)


def read_eigenvalues(directory: Path) -> dict[str, EigenvalueSum]:
    with safe_open(directory / "eigenvalues.safetensors", framework="pt") as file:
        return {name: EigenvalueSum(total=file.get_tensor(name), num_sequences=count) for name, count in _counts(file).items()}


def write_factors(directory: Path, factors: Mapping[str, LayerFactors]) -> None:
    """The corrected eigenvalues and λ of every layer; the eigenvectors stay where they are."""
    _save({name: factor.eigenvalues for name, factor in factors.items()}, directory / "factors.safetensors", {})
    summary = {
        name: {"damping": f.damping, "effective_dimension": f.effective_dimension(), "row_weight": f.row_weight()}
        for name, f in factors.items()
    }
    (directory / "factors.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def read_factor_summary(directory: Path) -> dict[str, dict[str, float]]:
    """λ, effective dimension and weight in rows of every layer."""
    summary: dict[str, dict[str, float]] = json.loads((directory / "factors.json").read_text(encoding="utf-8"))
    return summary


def read_factors(
    directory: Path, bases: Mapping[str, torch.Tensor], layers: Sequence[Layer], device: torch.device
) -> dict[str, LayerFactors]:
    """Every layer's factors on `device`; `bases` are the eigenvectors by `input_name` and `output_name`, already there."""
    summary = read_factor_summary(directory)
    with safe_open(directory / "factors.safetensors", framework="pt") as file:
        return {
            layer.name: LayerFactors(
                input_vectors=of(bases, layer.input_name),
                output_vectors=of(bases, layer.output_name),
                eigenvalues=file.get_tensor(layer.name).to(device),
                damping=summary[layer.name]["damping"],
            )
            for layer in layers
        }


def _save(tensors: Mapping[str, torch.Tensor], path: Path, counts: Mapping[str, int]) -> None:
    """Equal content gives equal bytes: the counts are one entry of the file's metadata, for safetensors writes several in random order."""
    metadata = {"counts": json.dumps(counts, sort_keys=True)} if counts else None
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def _counts(file: Any) -> dict[str, int]:
    counts: dict[str, int] = json.loads((file.metadata() or {}).get("counts", "{}"))
    return counts
