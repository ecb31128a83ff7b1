"""Flax models are loaded from what is saved of them; what does not fit is refused in a line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from flax_twins import CODE, Twin, flax_parameters, nnx_small, stacked, torch_twin
from small_run import Influence, World, write_yaml

from ekfac import attributable_layers
from ekfac.flax_linen import linen_model
from influence.config import ModelConfig
from influence.errors import RequestError
from influence.jax_model import load_flax, save_flax_model, save_optax_state
from influence.model import find_layers, model_fingerprint
from influence.optimizer_state import OptimizerState, read_optimizer_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_an_orbax_checkpoint_is_the_same_model(twin_world: World, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    copied = twin_world.copy(tmp_path)
    parameters = load_file(copied.model / "model.safetensors")
    (copied.model / "model.safetensors").unlink()
    with orbax.StandardCheckpointer() as writer:
        writer.save(copied.model / "checkpoint", {"params": unflatten_dict(parameters, sep="."), "step": np.array(3)})
    prints = [model_fingerprint(load_flax(ModelConfig(name=str(world.model), flax=CODE))) for world in (twin_world, copied)]
    assert prints[0] == prints[1]


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


def test_what_is_for_models_of_torch_alone_is_refused_in_a_line(twin_world: World, influence: Influence, tmp_path: Path) -> None:
    def run(**changes: dict[str, object]) -> Path:
        settings = twin_world.settings(tmp_path / "run", **changes)
        settings["model"]["flax"] = CODE
        return write_yaml(tmp_path / "config.yaml", settings)

    influence("run", run(factors={"split_layers": "heads"})).says("factors.split_layers: layers of a Flax model are not split")
    influence("run", run(model={"adapter": "somewhere"})).says("a Flax model takes no PEFT adapter")
    influence("run", run(data={"documents": "pack", "attention": "document"})).says("the model does not take position_ids")
    assert not list((tmp_path / "run").glob("covariances/*"))
