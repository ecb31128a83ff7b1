"""The exact Gauss-Newton Hessian of a language model's loss: its products with vectors, and the solution of linear systems by conjugate gradients.

EK-FAC takes G to be block-diagonal over layers and Kronecker-factored within each; here it is neither. A product with Q vectors takes one forward
pass, Q tangents of it (forward-mode differentiation), the curvature of the softmax, and Q backward passes that share the forward one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac.backend import Backend
from ekfac.experts import own_forward
from ekfac.language import SequenceBatch, at_each_counted, weighted
from ekfac.layers import Layer, evaluation_mode, expert_modules
from ekfac.parameters import as_parameters, as_vectors

Vectors = dict[str, Tensor]
"""Layer name → [Q, O, J]: one vector over the parameters of all the layers for each query."""


def gauss_newton_product(model: nn.Module, layers: Sequence[Layer], batch: SequenceBatch, vectors: Mapping[str, Tensor]) -> Vectors:
    """Σ over the batch's sequences of w_n J_nᵀ H_n J_n v for each of Q vectors v, w_n being their weights.

    J_n is the Jacobian of the sequence's logits at its counted tokens with respect to the layers' parameters, H_n = diag(p) - p pᵀ at each token the
    Hessian of its cross-entropy. Costs about 4/3 Q + 1/3 times a plain forward and backward pass over the batch.
    """
    if isinstance(model, Backend):
        return model.gauss_newton(layers, batch.tokens, weighted(batch.counted.double(), batch), vectors)
    tangents = as_parameters(model, layers, vectors)
    weights = {name: model.get_parameter(name).detach() for name in tangents}
    counted = batch.counted[:, 1:]

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(model, parameters, kwargs=batch.inputs).logits
        return output[:, :-1][counted].to(torch.promote_types(output.dtype, torch.float32))

    # The fused kernels of attention and of experts have no forward-mode derivative.
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), own_forward(model, expert_modules(layers)):
        values, backward = vjp(logits, weights)[:2]
        changes = vmap(lambda tangent: jvp(logits, (weights,), (tangent,))[1])(tangents)
        probabilities = values.softmax(-1)
        means = torch.einsum("mv,qmv->qm", probabilities, changes)
        curved = changes.sub_(means[:, :, None]).mul_(probabilities)
        if batch.weights is not None:
            curved.mul_(at_each_counted(batch.weights, batch).to(curved)[None, :, None])
        (products,) = vmap(backward)(curved)
    return as_vectors(model, layers, products)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What conjugate gradients found."""

    vectors: Vectors
    residuals: Tensor  # [steps + 1, Q]: ‖b - A x‖ / ‖b‖ in the norm √(rᵀ P r) of the preconditioner P, before the first step and after each


def conjugate_gradients(
    right: Mapping[str, Tensor],
    product: Callable[[Vectors], Vectors],
    precondition: Callable[[Vectors], Vectors],
    *,
    tolerance: float,
    max_steps: int,
    progress: Callable[[int, float], None] = lambda step, residual: None,
) -> Solution:
    """Solves A x = b for Q right-hand sides at once, by conjugate gradients from x = 0, of whose iterates the smallest residual is combined.

    `product(v)` is A v and `precondition(v)` = P v about A⁻¹ v, both for some of the Q. The iterates are averaged with weights that are the inverse
    squares of their residuals, which never grow then, in the norm of P, and are the smallest that so many products allow (Weiss 1996, Parameter-free
    iterative linear solvers, residual smoothing): were P = A⁻¹, this would be the error of x itself, in units of A. A query whose relative residual
    is at most `tolerance` takes no further part. `progress(step, largest residual)` is called after each step. Raises ValueError when A is not
    positive definite along a direction. (Hestenes and Stiefel 1952; preconditioned as in Saad 2003, algorithm 9.1.)
    """
    direction = precondition(dict(right))
    first = _dot(right, direction)
    active = torch.arange(len(first), device=first.device)[first > 0]
    solution = {name: torch.zeros_like(vector) for name, vector in right.items()}
    residual, direction = _some(right, active), _some(direction, active)
    iterate = _some(solution, active)
    energy = smallest = first[active]  # squares of the residuals, of the iterate and of the solution
    history = [(first > 0).double()]
    for step in range(1, max_steps + 1):
        if len(active) == 0:
            break
        image = product(direction)
        curvature = _dot(direction, image)
        if not bool((torch.isfinite(curvature) & (curvature > 0)).all()):
            raise ValueError("the system is not positive definite, or not finite: raise the damping")
        length = energy / curvature
        iterate = {name: iterate[name] + _times(direction[name], length) for name in iterate}
        residual = {name: residual[name] - _times(image[name], length) for name in residual}
        fresh = precondition(residual)
        before, energy = energy, _dot(residual, fresh)
        share = torch.where(energy > 0, smallest / (smallest + energy), 1.0)
        smallest = (1 - share) * smallest
        for name in solution:
            solution[name][active] += _times(iterate[name] - solution[name][active], share)
        history.append(history[-1].index_put((active,), (smallest / first[active]).sqrt()))
        progress(step, float(history[-1].max()))
        direction = {name: fresh[name] + _times(direction[name], energy / before) for name in fresh}
        unfinished = torch.arange(len(active), device=active.device)[history[-1][active] > tolerance]
        active, energy, smallest = active[unfinished], energy[unfinished], smallest[unfinished]
        residual, direction, iterate = _some(residual, unfinished), _some(direction, unfinished), _some(iterate, unfinished)
    return Solution(vectors=solution, residuals=torch.stack(history))


def _some(vectors: Mapping[str, Tensor], queries: Tensor) -> Vectors:
    return {name: vector[queries] for name, vector in vectors.items()}


def _dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """[Q], in float64: with float32 sums over millions of products conjugate directions would be lost."""
    return torch.stack([(left[name].double() * right[name].double()).flatten(1).sum(1) for name in left]).sum(0)


def _times(vector: Tensor, factors: Tensor) -> Tensor:
    return vector * factors.to(vector.dtype)[:, None, None]
