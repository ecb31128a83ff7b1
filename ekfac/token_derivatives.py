"""The derivative of every predicted token's own loss along one vector over the layers' parameters, all tokens in one forward pass.

Capture splits an inner product by the position of the update, which is where a token is the input. This splits it by the token that is predicted:
⟨v, ∇L⟩ is the sum of ⟨v, ∇ℓ_t⟩ over the counted tokens t, and forward-mode differentiation along v gives all of these at once.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac.backend import Backend
from ekfac.experts import own_forward
from ekfac.language import SequenceBatch, losses_by, weighted
from ekfac.layers import Layer, evaluation_mode, expert_modules
from ekfac.parameters import as_parameters


def token_loss_derivatives(model: nn.Module, layers: Sequence[Layer], batch: SequenceBatch, vector: Mapping[str, Tensor]) -> Tensor:
    """[N, T]: ⟨vector, gradient of the loss of this token⟩ for a vector [O, J] by layer, times the sequence's weight, zero where none is counted.

    Row sums equal the vector's inner products with the sequences' gradients (Grosse et al. 2023, appendix B, by linearity). Costs two forward passes.
    """
    if isinstance(model, Backend):
        logits, change = model.directional(layers, batch.tokens, vector)
        return weighted(jvp(lambda values: losses_by(values, batch), (logits,), (change,))[1], batch)
    tangents = as_parameters(model, layers, vector)
    weights = {name: model.get_parameter(name).detach() for name in tangents}

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return losses_by(functional_call(model, parameters, kwargs=batch.inputs).logits, batch)

    # The fused kernels of attention and of experts have no forward-mode derivative.
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), own_forward(model, expert_modules(layers)):
        derivatives: Tensor = jvp(losses, (weights,), (tangents,))[1]
    return weighted(derivatives, batch)
