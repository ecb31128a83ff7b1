"""What a plan says is what a run does: the same layers, the same bytes on disk, the memory it takes, the budget it asks for."""

import contextlib
import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from small_run import POSITIONS, Influence, World, command, tokenizer, write_yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ekfac import Coverage
from influence.adapters import quantization_state
from influence.batches import batch_budget, in_batches, model_memory
from influence.calibration import Rates, measure, rates_of
from influence.config import ModelConfig, load_config
from influence.data_size import SAMPLED_DOCUMENTS, assumed, sampled
from influence.documents import count_documents, read_documents
from influence.errors import RequestError
from influence.model import find_layers, load_model, load_tokenizer, model_without_weights
from influence.plan import Plan, largest_batch, model_shape, plan
from influence.run import Run


def configuration_of(model: nn.Module, directory: Path) -> Path:
    """A directory with nothing but the model's config.json."""
    directory.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    return directory


def rounded(coverage: Coverage) -> Coverage:
    """With the factor of a scaled embedding, which is measured on values, to six digits."""
    return replace(coverage, layers=tuple(replace(layer, lookup_factor=round(layer.lookup_factor, 6)) for layer in coverage.layers))


def same_layers(model: nn.Module, directory: Path) -> None:
    described = model_without_weights(ModelConfig(name=str(configuration_of(model, directory)), dtype="float32"))
    assert rounded(find_layers(described, ["*"])) == rounded(find_layers(model.float(), ["*"]))


def test_layers_found_without_weights_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    same_layers(tiny_model(architecture), tmp_path / "model")


def test_layers_found_without_weights_are_those_of_a_model_with_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    same_layers(MixtralForCausalLM(MixtralConfig(vocab_size=23, **sizes)).eval(), tmp_path / "model")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantized_base_is_counted_at_its_size(quantize: Literal["8bit", "4bit"], tmp_path: Path) -> None:
    """Its parameters, and the scales that belong to them, which are no parameters."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=POSITIONS, **sizes))
    base.save_pretrained(tmp_path / "model")
    tokenizer(["some words"]).save_pretrained(tmp_path / "model")
    adapted = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(name=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), quantize=quantize)
    described = model_without_weights(config)
    shape = model_shape(described, find_layers(described, ["*"]), quantize)
    loaded = load_model(config).model
    scales = quantization_state(loaded)
    parts = [*loaded.parameters(), *(value for name, value in scales.items() if name.endswith((".SCB", ".absmax")))]
    assert shape.parameter_bytes == sum(part.numel() * part.element_size() for part in parts)
    whole = model_shape(described, find_layers(described, ["*"]))
    assert shape.parameter_bytes < 0.6 * whole.parameter_bytes


def planned(influence: Influence, world: World, tmp_path: Path, *options: object, **changes: Any) -> dict[str, Any]:
    settings = write_yaml(tmp_path / "plan.yaml", world.settings(tmp_path / "run", **changes))
    found: dict[str, Any] = influence("plan", settings, "--json", "--device", "cpu", *options).json
    return found


def test_disk_is_that_of_the_run(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    found = planned(influence, world, tmp_path)
    stages = {name: stage["disk_bytes"] for name, stage in found["stages"].items() if name not in ("start", "fidelity")}
    measured = {name: sum(path.stat().st_size for path in (finished / name).rglob("*") if path.is_file()) for name in stages}
    assert stages == {name: pytest.approx(size, rel=0.2) for name, size in measured.items()}
    assert found["disk_bytes"] == pytest.approx(sum(measured.values()), rel=0.05)


def test_units_parameters_and_sequences_are_those_of_the_run(influence: Influence, world: World, finished: Path, tmp_path: Path) -> None:
    found, run = planned(influence, world, tmp_path), Run(finished)
    assert found["parameters"] == {
        "attributed": run.coverage.attributed,
        "total": run.coverage.total,
        "excluded": run.coverage.excluded,
        "whole": {},
    }
    assert found["data"]["sequences"] == len(run.training)
    assert found["data"]["tokens"] == run.training.summary["tokens"] / len(run.training)
    assert found["fitted_on"] == {stage: min(count, len(run.training)) for stage, count in run.fitted_on.items()}
    units = {name: stage["units"] for name, stage in found["stages"].items() if name != "start"}
    assert units == {name: len(list((finished / name).iterdir())) for name in units}


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """The most memory that was resident while the process lasted. Not its `ru_maxrss`, which begins with what the process had that started it."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        time.sleep(0.02)
    return peak


@pytest.mark.slow
def test_memory_is_that_of_the_run(influence: Influence, world: World, tmp_path: Path) -> None:
    """Nearly all of it is the interpreter's and the libraries', which the plan knows as a constant."""
    found = planned(influence, world, tmp_path)
    settings = write_yaml(tmp_path / "run.yaml", world.settings(tmp_path / "run"))
    process = command("run", settings)
    assert found["memory_bytes"] == pytest.approx(peak_bytes(process), rel=0.2)
    process.communicate()
    assert process.returncode == 0


def tiny_plan(world: World, tmp_path: Path, sequences: int = 40, rates: Rates | None = None, **changes: Any) -> Plan:
    flat = {f"{section}.{key}": value for section, keys in world.settings(tmp_path, **changes).items() for key, value in keys.items()}
    config = load_config(None, flat)
    model = model_without_weights(config.model)
    shape = model_shape(model, find_layers(model, config.factors.patterns))
    return plan(config, shape, assumed(sequences, 20.0, "made up"), rates or rates_of("cpu"), None)


def test_the_least_memory_that_is_planned_is_the_least_that_is_accepted(world: World, finished: Path, tmp_path: Path) -> None:
    needed, run = tiny_plan(world, tmp_path).needed_bytes, Run(finished)
    use = model_memory(run.language_model.model, run.coverage.layers)
    batch_budget(use, needed, POSITIONS, "cpu")
    with pytest.raises(RequestError, match="memory_budget"):
        batch_budget(use, needed - 1, POSITIONS, "cpu")


def test_a_model_larger_than_a_gpu_fits_on_as_many_as_advised(world: World, tmp_path: Path) -> None:
    small_gpu = replace(rates_of("h100"), memory_bytes=tiny_plan(world, tmp_path).needed_bytes * 2 // 3)
    too_little = tiny_plan(world, tmp_path, rates=small_gpu, resources={"memory_budget": small_gpu.memory_bytes})
    changes = " ".join(too_little.problems[0].changes)
    (gpus,) = map(int, re.findall(r"--gpus-per-worker (\d+) --memory-budget", changes))
    assert gpus == 2
    resources = {"memory_budget": gpus * small_gpu.memory_bytes, "gpus_per_worker": gpus}
    assert "--gpus-per-worker" not in str(tiny_plan(world, tmp_path, rates=small_gpu, resources=resources).problems)


def test_a_run_that_is_changed_as_advised_fits(world: World, tmp_path: Path) -> None:
    too_little = tiny_plan(world, tmp_path, resources={"memory_budget": 700_000})
    assert not too_little.fits
    (problem,) = too_little.problems
    raised, layers, half = problem.changes[0], problem.changes[1], problem.changes[2]
    (size,) = re.findall(r"--memory-budget (\S+)", raised)
    assert tiny_plan(world, tmp_path, resources={"memory_budget": size}).fits
    globs = re.findall(r"--layers '([^']+)'", layers)
    fewer = tiny_plan(world, tmp_path, resources={"memory_budget": 700_000}, factors={"layers": globs})
    assert fewer.fits
    assert f"{fewer.coverage.share:.1%}" in layers
    globs = re.findall(r"--layers '([^']+)'", half)
    changes = {"model": {"dtype": "bfloat16"}, "factors": {"layers": globs or ["all"]}}
    assert tiny_plan(world, tmp_path, resources={"memory_budget": 700_000}, **changes).fits


def test_rows_too_short_for_the_layers_are_told_with_the_bytes_that_do(world: World, tmp_path: Path) -> None:
    short = tiny_plan(world, tmp_path, index={"bytes_per_sequence": 5})
    (change,) = next(problem.changes for problem in short.problems if "rows of 5 bytes" in problem.what)
    (size,) = re.findall(r"--bytes-per-sequence (\d+)", change)
    assert tiny_plan(world, tmp_path, index={"bytes_per_sequence": int(size)}).fits
    assert not tiny_plan(world, tmp_path, index={"bytes_per_sequence": int(size) - 1}).fits


def test_batches_are_as_large_as_those_that_are_made(finished: Path) -> None:
    run = Run(finished)
    sequences = [replace(run.training[0], tokens=run.training[0].tokens[:9], counted=run.training[0].counted[:9])] * 50
    use = model_memory(run.language_model.model, run.coverage.layers)
    for extra in (30_000, 300_000, 10**9):
        budget = batch_budget(use, use.smallest(POSITIONS) + extra, POSITIONS, "cpu")
        made = [len(members) for members, _ in in_batches(sequences, budget, torch.device("cpu"))]
        assert largest_batch(budget, 9, 50) == max(made)


def test_more_documents_than_are_sampled_are_counted(world: World, tmp_path: Path) -> None:
    rows = world.data.read_text(encoding="utf-8").splitlines() * 50
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps({**json.loads(row), "id": str(n)}) for n, row in enumerate(rows)), encoding="utf-8")
    settings = world.settings(tmp_path)
    flat = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    config = load_config(None, {**flat, "data.files": str(many)})
    assert count_documents(config.data) == len(rows) == len(list(read_documents(config.data))) > SAMPLED_DOCUMENTS
    found, once = (sampled(data, load_tokenizer(config.model)) for data in (config.data, load_config(None, flat).data))
    assert found.sequences == 50 * once.sequences
    assert found.tokens == pytest.approx(once.tokens)


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt", "rows.jsonl.gz", "rows.parquet"])
def test_documents_are_counted_in_every_kind_of_file(name: str, world: World, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": f"line {n}"} for n in range(7)])
    path = tmp_path / name
    if name.endswith(".txt"):
        path.write_text("\n".join(rows["text"]), encoding="utf-8")
    else:
        writers = {".csv": rows.to_csv, ".parquet": rows.to_parquet, ".gz": lambda p: rows.to_json(p, compression="gzip")}
        writers[path.suffix](str(path))
    flat = {"model.name": str(world.model), "data.files": str(path), "run.dir": str(tmp_path)}
    assert count_documents(load_config(None, flat).data) == 7


@pytest.mark.slow
def test_70_billion_parameters_and_a_billion_sequences_are_planned_in_little_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    described = LlamaConfig(vocab_size=128256, architectures=["LlamaForCausalLM"], **sizes)
    described.save_pretrained(tmp_path / "model")
    process = command(
        "plan", "--model", tmp_path / "model", "--data", "none.jsonl", "--out", tmp_path / "run", "--dtype", "bfloat16",
        "--training-sequences", 10**9, "--device", "h200", "--workers", 64, "--json",
    )  # fmt: skip
    peak = peak_bytes(process)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert peak < 2 * 10**9
    found = json.loads(out)
    assert found["parameters"]["total"] == 70_553_706_496
    assert found["stages"]["rows"]["disk_bytes"] > 8192 * 10**9
    assert not found["fits"]
    assert re.search(r"--gpus-per-worker \d", found["problems"][0]["changes"][-1])
    assert any("--sequences-per-shard" in change for problem in found["problems"] for change in problem["changes"])


def test_workers_share_what_has_several_units(world: World, tmp_path: Path) -> None:
    seconds = [
        {stage.name: stage.seconds for stage in tiny_plan(world, tmp_path, sequences=16 * 1000, resources={"workers": count}).stages}
        for count in (1, 4, 5000)
    ]
    alone, shared, crowded = seconds
    assert shared["rows"] == pytest.approx(alone["rows"] / 4)
    assert crowded["rows"] == pytest.approx(alone["rows"] / 1000)
    assert crowded["covariances"] == pytest.approx(alone["covariances"] / 8)
    assert alone["lexical"] == shared["lexical"] == crowded["lexical"]


def test_this_machine_is_measured() -> None:
    rates = measure((16, 32), 24, "bfloat16")
    assert min(rates.products, rates.half_products, rates.eigen, rates.elementwise, rates.stream) > 0
    assert rates.memory_bytes


def test_a_plan_for_people_ends_with_whether_it_fits(influence: Influence, world: World, tmp_path: Path) -> None:
    settings = write_yaml(tmp_path / "plan.yaml", world.settings(tmp_path / "run"))
    fits = influence("plan", settings, "--device", "h100")
    assert fits.status == 0
    assert "eigenbases" in fits.out
    assert fits.out.splitlines()[-1].startswith("fits: ")
    small = influence("plan", settings, "--device", "cpu", "--memory-budget", "1KiB")
    assert small.status == 0
    assert "does not fit: " in small.out
    assert small.out.splitlines()[-1] == "this run does not fit as it is configured"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "'abacus' is not known; there are: a100, h100, h200"),
        (["--training-sequences", "many"], "Invalid value for '--training-sequences'"),
        (["--training-sequences", "0"], "Invalid value for '--training-sequences'"),
        (["--tokens-per-sequence", "33"], "more than data.sequence_length, 32"),
        (["--data", "nowhere.jsonl"], "--training-sequences says how many"),
        (["--layers", "*.nothing"], "no attributable layer matches '*.nothing'"),
        (["--sequence-length", "64"], "the model has 32 positions"),
        (["--memory-budget", "much"], "resources.memory_budget"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options: list[str], message: str, influence: Influence, world: World, tmp_path: Path) -> None:
    settings = write_yaml(tmp_path / "plan.yaml", world.settings(tmp_path / "run"))
    influence("plan", settings, *([] if "--device" in options else ["--device", "cpu"]), *options).says(message)


def test_a_model_without_configuration_is_one_line(influence: Influence, world: World, tmp_path: Path) -> None:
    moved = world.copy(tmp_path / "world")
    (moved.model / "config.json").unlink()
    settings = write_yaml(tmp_path / "plan.yaml", moved.settings(tmp_path / "run"))
    influence("plan", settings, "--device", "cpu").says("there is no config.json in")
    (moved.model / "config.json").write_text("{", encoding="utf-8")
    influence("plan", settings, "--device", "cpu").says("no causal language model is described by")


def test_weights_and_tokenizer_are_not_needed(influence: Influence, world: World, tmp_path: Path) -> None:
    moved = world.copy(tmp_path / "world")
    for path in moved.model.iterdir():
        if path.name != "config.json":
            path.unlink()
    found = planned(influence, moved, tmp_path, "--training-sequences", 1000, "--tokens-per-sequence", 16)
    assert (found["data"]["sequences"], found["data"]["tokens"]) == (1000, 16)
    assert found["data"]["basis"].startswith("no data read: no tokenizer can be loaded from")
