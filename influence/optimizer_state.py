"""The state that an optimizer of the Adam family left behind, and the damping that follows from it.

Training with Adam moves the parameters by learning rate × gradient / √v. Along a direction of curvature h in that metric, what one sequence adds to
the loss moves them, over a training whose learning rates sum to S, by ∫ e^(-h·rest) = (1 - e^(-hS)) / h times its gradient, whatever the schedule.
Up to a factor that falls like 1 / (h + 2/S) for small hS and like 1/h, which 1 / (h + 1/S) meets sooner, for large hS; 1.5/S lies between. So the
whole response is about (G + D)⁻¹ with D = 1.5 · T · diag(√v̂ + ε) / S: what the optimizer did not have the time to reach is damped, in its own
metric. T is the mean number of counted tokens of a sequence, for Adam saw the gradient of the mean loss per token and G is that of the sum.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ekfac import Layer, as_vectors
from ekfac.parameters import parameter_names
from influence.errors import RequestError

FILE = "optimizer.safetensors"
"""The name of the file, beside the model's own."""

_PREFIX = "exp_avg_sq."
_FACTS = ("betas", "eps", "step", "learning_rate_sum")


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Second moments by parameter name, corrected for their start at zero, and the sum of the learning rates of all steps."""

    second_moments: Mapping[str, Tensor]
    epsilon: float
    learning_rate_sum: float

    def damping(self, model: nn.Module, layers: Sequence[Layer], tokens_per_sequence: float) -> dict[str, Tensor]:
        """D, [O, J] by layer name, in the unit of G. Raises RequestError when a layer's parameters were not the optimizer's."""
        for name in (name for layer in layers for name in parameter_names(model, layer) if name):
            found, expected = self.second_moments.get(name), model.get_parameter(name).shape
            if found is None or found.shape != expected:
                came = "no" if found is None else f"a shape {tuple(found.shape)} of the"
                raise RequestError(
                    f"{FILE} has {came} second moment of {name} {tuple(expected)}: it belongs to another model, or the layer was not trained "
                    "(factors.layers leaves it out)"
                )
        scale = 1.5 * tokens_per_sequence / self.learning_rate_sum
        vectors = as_vectors(model, layers, {name: moment.sqrt() + self.epsilon for name, moment in self.second_moments.items()})
        like = next(model.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {name: (scale * vector).to(like.device, dtype) for name, vector in vectors.items()}


def read_optimizer_state(path: Path) -> OptimizerState:
    """The state in the file at `path`. Raises RequestError when it is not one, or does not say what is needed."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            moments = {name.removeprefix(_PREFIX): file.get_tensor(name).float() for name in file.keys() if name.startswith(_PREFIX)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read as safetensors: {error}") from None
    missing = [name for name in _FACTS if name not in facts]
    if missing or not moments:
        raise RequestError(
            f"{path} lacks {', '.join(missing) or f'tensors named {_PREFIX}*'}: write it with influence.save_optimizer_state after training"
        )
    try:
        beta, epsilon, step, learning_rate_sum = (float(facts[name].split(",")[-1]) for name in _FACTS)
    except ValueError:
        raise RequestError(f"{path}: {', '.join(f'{name}={facts[name]!r}' for name in _FACTS)} are not all numbers") from None
    if not (0 <= beta < 1 and epsilon >= 0 and step >= 1 and learning_rate_sum > 0):
        raise RequestError(f"{path}: beta2={beta}, eps={epsilon}, step={step}, learning_rate_sum={learning_rate_sum} are impossible")
    if any(not bool((torch.isfinite(moment) & (moment >= 0)).all()) for moment in moments.values()):
        raise RequestError(f"{path} holds second moments that are negative or not finite")
    corrected = {name: moment / (1 - beta**step) for name, moment in moments.items()}
    return OptimizerState(second_moments=corrected, epsilon=epsilon, learning_rate_sum=learning_rate_sum)


def save_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path | str, *, learning_rate_sum: float) -> Path:
    """Writes what `damping: optimizer` needs of an Adam or AdamW into the model's directory, and returns the path of the file.

    `learning_rate_sum` is Σ over all steps of the learning rate, which the optimizer itself does not keep. The file appears whole or not at all.
    Raises ValueError for an optimizer that keeps no second moments.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments, facts = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps no second moment of {names[id(parameter)]}: it must be of the Adam family, and trained"
                )
            moments[_PREFIX + names[id(parameter)]] = state["exp_avg_sq"].detach().float().cpu().contiguous()
            facts = {
                "optimizer": type(optimizer).__name__,
                "betas": ",".join(map(str, group["betas"])),
                "eps": str(group["eps"]),
                "step": str(int(state["step"])),
                "learning_rate_sum": repr(float(learning_rate_sum)),
            }
    path = Path(directory) / FILE
    scratch = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        save_file(moments, scratch, metadata=facts)
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path
