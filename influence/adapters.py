"""Adapters (PEFT): a base model whose weights are frozen, possibly quantized, with trained parameters of few numbers between its layers.

The libraries are asked for only where an adapter or a quantized base is.
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from influence.errors import RequestError

ADAPTER_FILE = "adapter_config.json"


def with_adapter(base: nn.Module, adapter: str) -> nn.Module:
    """The base with its adapter, whose parameters alone require gradients. Raises RequestError when it is no adapter of this base."""
    described = _described(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between the libraries
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            model = _peft().PeftModel.from_pretrained(base, adapter, is_trainable=True, config=described)
        except Exception as error:  # what is wrong with an adapter is said in many ways
            raise RequestError(f"the adapter {adapter!r} does not fit the model: {_first_line(error)}") from None
    return cast(nn.Module, model)


def with_described_adapter(base: nn.Module, adapter: str) -> nn.Module:
    """The same for a base on torch's device meta, of tensors of the `FakeTensorMode` within which it is called: shapes and no values."""
    described = _described(adapter)
    described.inference_mode = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between the libraries
            with torch.device("meta"), unset_fake_temporarily():  # peft moves what it makes, which tensors of that mode cannot be
                model = _peft().get_peft_model(base, described)
    except Exception as error:
        raise RequestError(f"the adapter {adapter!r} does not fit the model: {_first_line(error)}") from None
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fresh = made.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
                module._parameters[name] = fresh
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.zeros(b.shape, dtype=b.dtype)
    return cast(nn.Module, model)


def _described(adapter: str) -> Any:
    peft = _peft()
    if Path(adapter).is_absolute() and not (Path(adapter) / ADAPTER_FILE).is_file():
        raise RequestError(f"model.adapter: there is no {ADAPTER_FILE} in {adapter}")
    try:
        described = peft.PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise RequestError(f"no adapter can be loaded from {adapter!r}: {_first_line(error)}") from None
    if described.is_prompt_learning:
        raise RequestError(
            f"{adapter} is an adapter of kind {described.peft_type.value}, whose parameters are inputs and no layers: it cannot be attributed"
        )
    return described


def check_no_adapter(name: str) -> None:
    """Raises RequestError when the directory given as a model holds an adapter: its base has to be named."""
    directory = Path(name)
    if (directory / ADAPTER_FILE).is_file() and not (directory / "config.json").is_file():
        raise RequestError(f"{name} is an adapter: give its base as the model, and this directory as model.adapter (--adapter)")


def quantized(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` must be told to load the weights in 8 or 4 bits; nothing for None. Raises RequestError where the library is missing."""
    if bits is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise RequestError("model.quantize needs bitsandbytes: pip install 'influence[adapters]'") from None
    from transformers import BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": settings, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}


def stay_differentiable(model: nn.Module) -> None:
    """Keeps weights in 4 bits as they were loaded: on some CPUs bitsandbytes packs them at the first pass without gradients, for kernels that have
    no derivative."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def adapter_settings(model: nn.Module) -> str | None:
    """What a model's adapters compute besides their weights, as text; None for a model without adapters."""
    found = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not found:
        return None
    places = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
    told = {
        name: {key: value for key, value in settings.to_dict().items() if key not in places} for name, settings in sorted(found.items())
    }
    return json.dumps(told, sort_keys=True, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value))


def quantization_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The scales that give quantized weights their values, by name; nothing for a model without such weights."""
    own = dict(model.named_parameters())
    quantized = {name.rpartition(".")[0] for name, p in own.items() if not p.is_floating_point()}
    if not quantized:
        return {}
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: value
        for name, value in sorted(model.state_dict().items())
        if isinstance(value, torch.Tensor)
        and name not in own
        and name not in buffers
        and any(name.rsplit(".", count)[0] in quantized for count in (1, 2, 3))
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise RequestError("model.adapter needs peft: pip install 'influence[adapters]'") from None
    return peft


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
