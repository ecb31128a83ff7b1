"""Loading a Flax language model: the code that makes it, named by the configuration, and its parameters from safetensors or an Orbax checkpoint.

Imported only where a configuration names such a model, because JAX need not be installed.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from influence.config import ModelConfig
from influence.errors import RequestError
from influence.optimizer_state import FILE as OPTIMIZER_STATE

CODE_VARIABLE = "INFLUENCE_FLAX"
"""The environment variable that names the code which may be run to make the models of runs that are opened; several are separated by commas."""

PARAMETERS = "model.safetensors"


def check_trusted(reference: str, named: str | None, run: str) -> None:
    """Raises RequestError when neither the configuration (`named`) nor the environment names the code that a run's record asks for."""
    if reference != named and reference not in os.environ.get(CODE_VARIABLE, "").split(","):
        raise RequestError(f"the model of {run} is made by code, {reference}: where you trust it, set {CODE_VARIABLE}={reference}")


def load_flax(config: ModelConfig) -> Any:
    """The model as an `ekfac.jax_model.JaxModel`. Raises RequestError when JAX, the code or a parameter is missing, or does not fit."""
    _check_installed()
    from ekfac.flax_linen import linen_model
    from ekfac.flax_nnx import nnx_model

    directory, settings = _described(config)
    module, call = _made(config, settings, directory)
    parameters = _in_dtype(_read_parameters(directory), config)
    options = _options(settings)
    if _is_linen(module):
        _check_names(_shapes(_linen_parameters(module, call, config)), parameters, str(config.flax))
        return linen_model(module, {"params": _nested(parameters)}, call=call, **options)
    from flax import nnx

    state = nnx.state(module, nnx.Param)
    _check_names(_shapes(nnx.to_pure_dict(state)), parameters, str(config.flax))
    nnx.update(module, _filled(state, parameters))
    return nnx_model(module, call=call, **options)


def flax_without_weights(config: ModelConfig) -> Any:
    """The model as its code and config.json describe it, of parameters that have shapes and no values. Raises RequestError as `load_flax`."""
    _check_installed()
    import jax
    from flax import nnx

    from ekfac.flax_linen import linen_model
    from ekfac.flax_nnx import nnx_model

    directory, settings = _described(config)
    found: list[Any] = []

    def made() -> Any:
        module, call = _made(config, settings, directory)
        found[:] = [module, call]
        return () if _is_linen(module) else module

    with jax.enable_x64(config.dtype == "float64"):
        abstract = nnx.eval_shape(made)
        module, call = found
        if _is_linen(module):
            parameters = _nested(_flat(_linen_parameters(module, call, config)))
            return linen_model(module, {"params": _with_dtype(parameters, config)}, call=call, **_options(settings))
        nnx.update(abstract, _with_dtype(nnx.state(abstract, nnx.Param), config))
        return nnx_model(abstract, call=call, **_options(settings))


def _with_dtype(shapes: Any, config: ModelConfig) -> Any:
    import jax
    import jax.numpy as jnp

    def described(one: Any) -> Any:
        return jax.ShapeDtypeStruct(one.shape, config.dtype if jnp.issubdtype(one.dtype, jnp.floating) else one.dtype)

    return jax.tree.map(described, shapes)


def _check_installed() -> None:
    try:
        import flax  # noqa: F401
        import jax  # noqa: F401
    except ImportError as error:
        raise RequestError(f"model.flax needs JAX and Flax ({error}): pip install -c constraints.txt -e '.[jax]'") from None


def _described(config: ModelConfig) -> tuple[Path, dict[str, Any]]:
    """The model's directory, and the content of its config.json."""
    directory = Path(config.name)
    if not directory.is_dir():
        raise RequestError(f"there is no model directory at {config.name} (a Flax model is not taken from a hub)")
    return directory, _settings(directory)


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    longest = settings.get("max_position_embeddings", settings.get("n_positions"))
    return {"longest": longest if isinstance(longest, int) else None, "vocab_size": settings.get("vocab_size", 0)}


def _made(config: ModelConfig, settings: Mapping[str, Any], directory: Path) -> tuple[Any, Any]:
    """The module that the configured code makes, and how it is called, where the code says so."""
    from flax import linen, nnx

    assert config.flax is not None
    try:
        made = _builder(config.flax)(dict(settings))
    except RequestError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise RequestError(
            f"model.flax: {config.flax} failed on the settings of {directory / 'config.json'}: {_first_line(error)}"
        ) from None
    module, call = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, linen.Module | nnx.Module):
        raise RequestError(
            f"model.flax: {config.flax} gave a {type(module).__name__}: expected a flax.linen or nnx module, or such a module and how to call it"
        )
    return module, call


def _is_linen(module: Any) -> bool:
    from flax import linen

    return isinstance(module, linen.Module)


def _settings(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RequestError(f"{directory / 'config.json'} cannot be read: {_first_line(error)}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{directory / 'config.json'} is not a JSON object")
    return found


def _builder(reference: str) -> Callable[[dict[str, Any]], Any]:
    """The function that `package.module:function` or `file.py:function` names."""
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise RequestError(f"model.flax: expected package.module:function or file.py:function; got {reference!r}")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # the user's code may raise anything
        raise RequestError(f"model.flax: {place} cannot be imported: {_first_line(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise RequestError(f"model.flax: {place} has no function {name}")
    return function  # type: ignore[no-any-return]


def _read_parameters(directory: Path) -> dict[str, Any]:
    """Parameters by name, from model.safetensors or else from the Orbax checkpoint in the directory or one below it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if (directory / PARAMETERS).is_file():
        try:
            return load_file(directory / PARAMETERS)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise RequestError(f"{directory / PARAMETERS} cannot be read: {_first_line(error)}") from None
    places = sorted(path.parent for path in directory.rglob("_METADATA"))
    if len(places) != 1:
        raise RequestError(f"{directory} holds neither {PARAMETERS} nor one Orbax checkpoint (found {len(places)}): one step is wanted")
    return _from_orbax(places[0])


def _from_orbax(place: Path) -> dict[str, Any]:
    import numpy as np

    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise RequestError(f"{place} needs Orbax ({error}): pip install -c constraints.txt -e '.[jax]'") from None
    try:
        with orbax.PyTreeCheckpointer() as reader:
            described = reader.metadata(place)
            tree = getattr(described, "item_metadata", described)
            tree = getattr(tree, "tree", tree)
            import jax

            kinds = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), tree)
            found = reader.restore(place, args=orbax.args.PyTreeRestore(restore_args=kinds))
    except Exception as error:  # Orbax raises errors of every kind for a damaged checkpoint
        raise RequestError(f"the Orbax checkpoint {place} cannot be read: {_first_line(error)}") from None
    while isinstance(found, Mapping) and isinstance(found.get("params"), Mapping):
        found = found["params"]
    flat = {name.removesuffix(".value"): value for name, value in _flat(found).items()}
    return {name: np.asarray(value) for name, value in flat.items()}


def save_flax_model(directory: Path | str, parameters: Any, settings: Mapping[str, Any]) -> Path:
    """Writes a model's parameters and its settings where `influence run --model DIRECTORY --flax …` finds them; returns the directory.

    `parameters` are those of a linen module (the tree, with or without "params" at its top) or an nnx module. The tokenizer's files belong there too
    (`tokenizer.save_pretrained(directory)`).
    """
    import jax
    import numpy as np
    from flax import nnx
    from safetensors.numpy import save_file

    if isinstance(parameters, nnx.Module):
        parameters = nnx.to_pure_dict(nnx.state(parameters, nnx.Param))
    elif isinstance(parameters, Mapping) and isinstance(parameters.get("params"), Mapping):
        parameters = parameters["params"]
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    flat = {name: np.ascontiguousarray(jax.device_get(value)) for name, value in _flat(parameters).items()}
    for name, write in (
        (PARAMETERS, lambda scratch: save_file(flat, scratch)),
        ("config.json", lambda scratch: scratch.write_text(json.dumps(dict(settings), indent=2), encoding="utf-8")),
    ):
        scratch = place / f".{name}.{os.getpid()}"
        try:
            write(scratch)
            scratch.rename(place / name)
        finally:
            scratch.unlink(missing_ok=True)
    return place


def save_optax_state(
    state: Any, directory: Path | str, *, learning_rate_sum: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Path:
    """As `influence.save_optimizer_state`, for the state of an optax optimizer of the Adam family, made with these `b1`, `b2` and `eps`.

    The optimizer's parameters must be those that `save_flax_model` was given. Raises ValueError for a state without second moments.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    found = [one for one in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(one)]
    if len(found) != 1:
        raise ValueError(f"the optimizer's state holds second moments {len(found)} times, expected once: it must be of the Adam family")
    moments = found[0].nu["params"] if isinstance(found[0].nu, Mapping) and isinstance(found[0].nu.get("params"), Mapping) else found[0].nu
    tensors = {f"exp_avg_sq.{name}": np.ascontiguousarray(value, np.float32) for name, value in _flat(jax.device_get(moments)).items()}
    facts = {"optimizer": "optax", "betas": f"{b1},{b2}", "eps": str(eps), "step": str(int(found[0].count))}
    path = Path(directory) / OPTIMIZER_STATE
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, metadata=facts | {"learning_rate_sum": repr(float(learning_rate_sum))})
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _is_adam(state: Any) -> bool:
    return hasattr(state, "nu") and hasattr(state, "count")


def _in_dtype(parameters: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """As arrays of the configured type. Raises RequestError for a parameter that is not finite."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    found = {}
    with jax.enable_x64(config.dtype == "float64"):
        for name, value in parameters.items():
            array = jnp.asarray(np.asarray(value))
            if jnp.issubdtype(array.dtype, jnp.floating):
                array = array.astype(config.dtype)
            if not bool(jnp.isfinite(array).all()):
                raise RequestError(f"the model's weights are not finite: {name} holds NaN or infinity")
            found[name] = array
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their path, joined by dots."""
    if not isinstance(tree, Mapping | list | tuple):
        return {} if tree is None else {prefix: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    from flax.traverse_util import unflatten_dict

    return dict(unflatten_dict(dict(parameters), sep="."))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in _flat(tree).items()}


def _linen_parameters(module: Any, call: Callable[..., Any] | None, config: ModelConfig) -> Any:
    """The shapes and types of the module's parameters, from initialising it without computing anything."""
    import jax
    import jax.numpy as jnp

    def initialised() -> Any:
        key, tokens = jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        if call is None:
            return module.init(key, tokens)
        return call(lambda *arguments, **named: module.init(key, *arguments, **named), tokens)

    try:
        found = jax.eval_shape(initialised)
    except Exception as error:  # the user's code may raise anything
        raise RequestError(f"model.flax: the module of {config.flax} cannot be initialised with token ids: {_first_line(error)}") from None
    if others := sorted(set(found) - {"params"}):
        raise RequestError(
            f"model.flax: the module of {config.flax} has variables other than parameters ({', '.join(others)}), which are not supported"
        )
    return found["params"]


def _check_names(expected: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any], reference: str) -> None:
    for name, shape in expected.items():
        came = tuple(parameters[name].shape) if name in parameters else None
        if came != shape:
            raise RequestError(f"the checkpoint has {'no' if came is None else f'{came} as'} {name}, but {reference} makes {shape}")
    if extra := sorted(set(parameters) - set(expected)):
        raise RequestError(f"the checkpoint holds {extra[0]} ({len(extra)} such), which the model that {reference} makes does not have")


def _filled(state: Any, parameters: Mapping[str, Any]) -> Any:
    import jax

    from ekfac.flax_nnx import parameter_name

    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree_util.tree_unflatten(structure, [parameters[parameter_name(path)] for path, _ in leaves])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
