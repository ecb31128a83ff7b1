"""The whole product on a Flax model: a run gives the answers of the torch twin's run; what does not fit is refused in a line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flax_twins
import jax
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, Twin, finished_twin, flax_parameters, nnx_small, quick_compilation, stacked, torch_twin
from safetensors.torch import save_file
from small_run import Influence, World, write_yaml

from ekfac import attributable_layers
from ekfac.flax_linen import linen_model
from influence.config import ModelConfig
from influence.errors import RequestError
from influence.jax_model import CODE_VARIABLE, load_flax, save_flax_model, save_optax_state
from influence.model import find_layers
from influence.optimizer_state import OptimizerState, read_optimizer_state
from influence.run import Run


@pytest.fixture(scope="module", autouse=True)
def compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def twin_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return flax_twins.twin_world(tmp_path_factory)


@pytest.fixture(scope="module")
def twin_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_twin(tmp_path_factory)


def test_a_flax_run_answers_as_the_torch_run_of_the_same_weights(twin_run: Run, finished: Path) -> None:
    """Scores to 1e-3 of the largest: float32 gradients, solved with damping of a tenth of the mean eigenvalue."""
    torch_run = Run(finished)
    both = [[{**vars(layer), "modules": None} for layer in run.coverage.layers] for run in (twin_run, torch_run)]
    assert both[0] == both[1]  # but that in torch the tied head is a module of its own
    assert twin_run.coverage.share == 1
    mine, expected = twin_run.factors, torch_run.factors
    for name, factors in mine.items():
        largest = float(expected[name].eigenvalues.max())
        assert torch.allclose(factors.eigenvalues.sum(), expected[name].eigenvalues.sum(), rtol=1e-4, atol=1e-6 * largest), name
        assert factors.damping == pytest.approx(expected[name].damping, rel=1e-4)
    np.testing.assert_allclose(twin_run.self_influence, torch_run.self_influence, rtol=1e-3)
    # A row's bit is the sign of a sum: those near zero may differ.
    codes = [np.concatenate([np.load(path / "rows.npy") for path in run._row_paths()]) for run in (twin_run, torch_run)]
    assert np.unpackbits(codes[0] ^ codes[1]).mean() < 0.01
    for options in ({}, {"exact": True}, {"by_output_token": True}):
        found, wanted = (run.query("Oslo lies on the", " Aker", k=8, **options) for run in (twin_run, torch_run))  # type: ignore[arg-type]
        largest = max(one.score for one in wanted.sequences)
        assert [one.id for one in found.sequences] == [one.id for one in wanted.sequences]
        for one, other in zip(found.sequences, wanted.sequences, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3 * largest)
            shares = [[share for _, share in tokens] for tokens in (one.tokens, other.tokens)]
            np.testing.assert_allclose(*shares, atol=1e-3 * largest)


@pytest.mark.slow
def test_refined_answers_and_functions_are_those_of_the_torch_run(twin_run: Run, finished: Path) -> None:
    from influence.answering import QueryOptions
    from influence.refinement import RefineOptions

    options = QueryOptions(k=5, exact=True, refine=RefineOptions(sequences=16, steps=2))
    found, wanted = (run.answer([run.measure("Lima lies on the", " Rímac")], options)[0] for run in (twin_run, Run(finished)))
    scores = [{one.id: one.score for one in result.sequences} for result in (found, wanted)]
    assert scores[0] == pytest.approx(scores[1], rel=0.01)

    def margin(model: torch.nn.Module, batch: object) -> torch.Tensor:
        logits = model(input_ids=batch.tokens).logits  # type: ignore[attr-defined]
        return logits[:, 2, 7] - logits[:, 3, 11]  # type: ignore[no-any-return]

    found, wanted = (run.query_function(margin, "Lima lies on the", " Rímac", k=5, exact=True) for run in (twin_run, Run(finished)))
    assert [one.id for one in found.sequences] == [one.id for one in wanted.sequences]


def test_a_direction_inside_the_model_is_asked_about(twin_run: Run, finished: Path, tmp_path: Path) -> None:
    save_file({"transformer.h.0": torch.sin(torch.arange(16.0))}, tmp_path / "feature.safetensors")
    file, answers = tmp_path / "feature.safetensors", []
    for run in (twin_run, Run(finished)):
        found = run.query_direction(file, "Oslo lies on the", " Aker", reduce="last", k=len(run.store), exact=True)
        answers.append(found.scores())
    assert answers[0].keys() == answers[1].keys()
    largest = max(map(abs, answers[1].values()))
    assert answers[0] == pytest.approx(answers[1], abs=1e-3 * largest)


def test_a_direction_that_the_model_does_not_have_is_refused(
    influence: Influence, twin_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CODE_VARIABLE, CODE)
    file = tmp_path / "feature.safetensors"
    words = ("query", twin_run.directory.path, "Oslo lies on the", " Aker", "--direction", file)
    save_file({"transformer.h.7": torch.ones(16)}, file)
    influence(*words).says("the model has no module 'transformer.h.7'; the nearest are transformer.h.")
    save_file({"transformer.h.1": torch.ones(8)}, file)
    influence(*words).says("the vector has shape (8,), but transformer.h.1 gives 16 numbers a position")


def test_an_nnx_module_gets_the_parameters_that_were_saved(tmp_path: Path) -> None:
    module, _ = nnx_small({"width": 4})
    nnx.update(module, jax.tree.map(lambda value: value + 0.5, nnx.state(module, nnx.Param)))
    place = save_flax_model(tmp_path / "model", module, {"width": 4})
    config = ModelConfig(name=str(place), flax=CODE.replace("linen_twin", "nnx_small"))
    model, tokens = load_flax(config), np.arange(6)[None]
    np.testing.assert_allclose(model(input_ids=torch.from_numpy(tokens)).logits, module(tokens), atol=1e-5)
    assert {layer.name for layer in find_layers(model, ["blocks.*"]).layers} == {"blocks.0", "blocks.1"}
    save_flax_model(place, module, {"width": 5})
    with pytest.raises(RequestError, match=r"the checkpoint has \(4,\) as blocks.0.bias, but .* makes \(5,\)"):
        load_flax(config)


def test_an_orbax_checkpoint_is_the_same_model(twin_run: Run, twin_world: World, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    copied = twin_world.copy(tmp_path)
    parameters = load_file(copied.model / "model.safetensors")
    (copied.model / "model.safetensors").unlink()
    with orbax.StandardCheckpointer() as writer:
        writer.save(copied.model / "checkpoint", {"params": unflatten_dict(parameters, sep="."), "step": np.array(3)})
    opened = Run(twin_run.directory.path, model=str(copied.model), flax=CODE)
    assert opened.language_model.model is not None  # the same fingerprint, or it would be refused


def test_damping_by_an_optax_state_is_that_of_the_torch_optimizer(tmp_path: Path) -> None:
    """The same second moments, named and laid out as each framework does."""
    torch_model, parameters = torch_twin(torch.float32), flax_parameters(torch_twin(torch.float32))
    model = linen_model(Twin(layout="scanned"), {"params": unflatten_dict(stacked(parameters), sep=".")})
    moments = {name: value**2 for name, value in stacked(parameters).items()}
    optimizer = optax.adamw(0.1)
    state = optimizer.init({"params": unflatten_dict(moments, sep=".")})
    state = (state[0]._replace(nu={"params": unflatten_dict(moments, sep=".")}, count=np.array(7)), *state[1:])
    path = save_optax_state(state, tmp_path, learning_rate_sum=0.5)
    found = read_optimizer_state(path)
    expected = OptimizerState(
        second_moments={name: value.detach().square() / (1 - 0.999**7) for name, value in torch_model.named_parameters()},
        epsilon=1e-8,
        learning_rate_sum=0.5,
    )
    layers, others = (attributable_layers(one, lambda m: m(input_ids=torch.arange(6)[None])).layers for one in (model, torch_model))
    mine, wanted = found.damping(model, layers, 9.0), expected.damping(torch_model, others, 9.0)
    for layer in layers:
        name = re.sub(r"^transformer\.h\.(.*)\.(\d)$", r"transformer.h.\2.\1", layer.name)
        assert torch.allclose(mine[layer.name], wanted[name], rtol=1e-5), layer.name
    with pytest.raises(ValueError, match="Adam family"):
        save_optax_state(optax.sgd(0.1).init(parameters), path.parent, learning_rate_sum=0.5)


def test_the_project_is_imported_without_jax() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'optax', 'orbax'))); import ekfac, influence, jobs.cli, influence.jax_model"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_code_that_only_a_run_names_is_not_imported(twin_run: Run, influence: Influence, monkeypatch: pytest.MonkeyPatch) -> None:
    run = twin_run.directory.path
    influence("query", run, "Oslo lies on the", " Aker").says(f"is made by code, {CODE}: where you trust it, set {CODE_VARIABLE}={CODE}")
    monkeypatch.setenv(CODE_VARIABLE, f"other:thing,{CODE}")
    assert Run(run).language_model.model is not None


def test_a_flax_model_that_does_not_fit_is_refused_in_a_line(twin_world: World, influence: Influence, tmp_path: Path) -> None:
    def run(model: Path, flax: str) -> Path:
        settings = twin_world.settings(tmp_path / "run", model={"name": str(model), "flax": flax})
        return write_yaml(tmp_path / "config.yaml", settings)

    model = twin_world.model
    influence("run", run(model, "nowhere:build")).says("nowhere cannot be imported: ModuleNotFoundError")
    influence("run", run(model, "json:nothing")).says("json has no function nothing")
    influence("run", run(model, "build")).says("expected package.module:function or file.py:function")
    influence("run", run(model, "json:dumps")).says("gave a str: expected a flax.linen or nnx module")
    influence("run", run(model, f"{CODE.partition(':')[0]}:Twin")).says("cannot be initialised with token ids")
    changed = shutil.copytree(model, tmp_path / "changed")
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**settings, "n_embd": 8}))
    influence("run", run(changed, CODE)).says("the checkpoint has (48,) as transformer.h.0.attn.c_attn.bias")
    (changed / "config.json").write_text(json.dumps(settings))
    (changed / "model.safetensors").write_bytes(b"nothing")
    influence("run", run(changed, CODE)).says("model.safetensors cannot be read")
    (changed / "model.safetensors").unlink()
    influence("run", run(changed, CODE)).says("holds neither model.safetensors nor one Orbax checkpoint")
    assert not (tmp_path / "run").exists()
