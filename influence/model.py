"""Loading a causal language model and its tokenizer, the fingerprints by which they are known again, and finding the model's layers."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ekfac import Coverage, Split, attributable_layers, evaluation_mode
from influence.adapters import (
    adapter_settings,
    check_no_adapter,
    quantization_state,
    quantized,
    stay_differentiable,
    with_adapter,
    with_described_adapter,
)
from influence.config import ModelConfig
from influence.errors import RequestError

LAYER_TRIAL_LENGTH = 11


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model in evaluation mode, on one device or with its layers on several, and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model takes its input and gives its output."""
        return next(self.model.parameters()).device

    @property
    def is_divided(self) -> bool:
        """Whether its layers lie on several devices."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1


def load_model(config: ModelConfig, memory_budget: int = 0) -> LanguageModel:
    """The model on the GPU when there is one; on as many as have the budget's memory together, where one has less.

    Raises RequestError when it cannot be found, is not causal, has weights that are not finite, or has too many for these GPUs.
    """
    if config.flax is not None:
        from influence.jax_model import load_flax

        return LanguageModel(model=load_flax(config), tokenizer=load_tokenizer(config))
    from transformers import AutoModelForCausalLM

    divided = _division(memory_budget)
    if Path(config.name).is_absolute() and not Path(config.name).is_dir():
        raise RequestError(f"there is no model directory at {config.name} (if it moved, --model says where it is now)")
    check_no_adapter(config.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.name,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            **quantized(config.quantize, getattr(torch, config.dtype)),
            **divided,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RequestError(f"no causal language model can be loaded from {config.name!r}: {_first_line(error)}") from None
    if offloaded := [name for name, device in getattr(model, "hf_device_map", {}).items() if device in ("cpu", "disk") and divided]:
        raise RequestError(
            f"the model does not fit on {torch.cuda.device_count()} GPUs within resources.memory_budget, the first that does not is {offloaded[0]}: "
            "raise it, or give a worker more of them (--gpus-per-worker)"
        )
    if config.adapter is not None:
        model = with_adapter(model, config.adapter)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RequestError(f"the model's weights are not finite: {name} holds NaN or infinity")
    if config.dtype == "float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
    model.eval()
    fuse_activations(model)
    stay_differentiable(model)
    if not (divided or config.quantize):  # which are put there when they are loaded
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(model=model, tokenizer=load_tokenizer(config))


def fuse_activations(model: nn.Module) -> None:
    """Puts torch's own GELU in the place of those that transformers writes as eight operations, as in GPT-2: a tenth less of a capture pass.

    It is the same function (the approximation by tanh); values differ in their last digits.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _division(memory_budget: int) -> dict[str, Any]:
    """What asks transformers to put the layers on several GPUs: nothing, where the budget is no more than one has."""
    sizes = [torch.cuda.get_device_properties(place).total_memory for place in range(torch.cuda.device_count())]
    used = min(len(sizes), -(-memory_budget // min(sizes))) if sizes else 0
    if used < 2:
        return {}
    return {"device_map": "balanced", "max_memory": dict.fromkeys(range(used), memory_budget // used)}


def model_without_weights(config: ModelConfig) -> nn.Module:
    """The model as its config.json describes it, on the CPU, of tensors that have shapes and no values and take no memory.

    Raises RequestError when there is no configuration of a causal language model.
    """
    if config.flax is not None:
        from influence.jax_model import flax_without_weights

        return cast(nn.Module, flax_without_weights(config))
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(config.name).is_absolute() and not (Path(config.name) / "config.json").is_file():
        raise RequestError(f"there is no config.json in {config.name}, which says what the model is like; its weights are not needed")
    try:
        described = AutoConfig.from_pretrained(config.name, revision=config.revision)
        shapes_alone = FakeTensorMode()
        with shapes_alone if config.adapter is None else torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(described, dtype=getattr(torch, config.dtype))
            model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on values
    except Exception as error:  # what a model's own code raises over sizes that do not go together can be anything
        raise RequestError(f"no causal language model is described by {config.name!r}: {_first_line(error)}") from None
    if config.adapter is not None:
        with shapes_alone:
            model = with_described_adapter(model, config.adapter)
    model.eval()
    return cast(nn.Module, model)


def find_layers(model: nn.Module, patterns: Sequence[str], split: Split = "none") -> Coverage:
    """The model's attributable layers that match one of the patterns, found by running it once; it may be one without weights.

    Raises RequestError for a pattern that matches none.
    """
    some = next(model.parameters())
    length = min(LAYER_TRIAL_LENGTH, longest_sequence(model) or LAYER_TRIAL_LENGTH)  # one that is hardly a number of heads

    def call(model: nn.Module) -> None:
        # Rows of the embedding that are not zero, as the padding's may be.
        with getattr(some, "fake_mode", nullcontext()):
            tokens = torch.arange(1, 1 + length, device=some.device)
            model(input_ids=(tokens % embedded_tokens(model))[None], use_cache=False)

    try:
        return attributable_layers(model, call, patterns, positions=(1, length), same_positions=True, split=split)
    except ValueError as error:
        raise RequestError(f"factors.layers: {error}") from None


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's fast tokenizer, which tells where in the text each token stands."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
    except Exception as error:  # the tokenizers library raises Exception itself for a file it does not understand
        raise RequestError(
            f"no tokenizer can be loaded from {config.name!r} (is its tokenizer.json whole?): {_first_line(error)}"
        ) from None
    if not tokenizer.is_fast:
        raise RequestError(f"the tokenizer of {config.name!r} has no fast version, which is needed to tell where its tokens stand")
    return tokenizer


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over names, types, shapes and values of the weights, and the settings of adapters; tied weights and the device make no difference."""
    total = hashlib.sha256((adapter_settings(model) or "").encode())
    for name, parameter in sorted([*model.named_parameters(), *quantization_state(model).items()]):
        total.update(json.dumps([name, str(parameter.dtype), list(parameter.shape)]).encode())
        total.update(parameter.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return "sha256:" + total.hexdigest()


def tokenizer_fingerprint(tokenizer: Any, *, with_template: bool = False) -> str:
    """sha256 over the tokenizer's rules, vocabulary and special tokens, and its chat template where data are written by it."""
    content: list[Any] = [
        tokenizer.backend_tokenizer.to_str(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
    ]
    content += [tokenizer.chat_template] if with_template else []
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_takes_documents_apart(loaded: LanguageModel) -> None:
    """Raises RequestError for a model whose logits for a packed document, told of by positions that begin anew, are not those of the document alone.

    Tried on two short documents. A few models know no positions, or carry a state from token to token.
    """
    model = loaded.model
    lengths = [3, 5]
    tokens = torch.arange(1, 1 + sum(lengths), device=loaded.device)[None] % embedded_tokens(model)
    positions = torch.cat([torch.arange(length, device=loaded.device) for length in lengths])[None]
    try:
        with torch.no_grad(), evaluation_mode(model):
            packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
            alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in torch.split(tokens, lengths, 1)], 1)
    except TypeError:
        raise RequestError(
            "data.attention is document, but the model does not take position_ids: it cannot keep packed documents apart"
        ) from None
    coarse = max(torch.finfo(packed.dtype).eps, torch.finfo(torch.float32).eps)  # norms of models in float64 may be in float32
    if float((packed - alone).abs().max()) > coarse**0.5 * float(alone.abs().max()):
        raise RequestError(
            "data.attention is document, but the model does not keep packed documents apart (their logits are not those of each alone): "
            "attention: sequence explains it as it computes"
        )


def longest_sequence(model: nn.Module) -> int | None:
    """How many positions the model knows, when its configuration says so."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) else None


def embedded_tokens(model: Any) -> int:
    """How many tokens the model has an embedding of."""
    return int(model.get_input_embeddings().weight.shape[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
