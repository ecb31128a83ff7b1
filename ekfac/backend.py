"""What a model must be able to do whose computation is another framework's: the seam between torch and the rest.

Losses, measurements and everything after capture are written for torch tensors and are the same for every model. A model of another framework is a
torch module all the same: it is called with token ids and gives logits, and answers for its layers, their records and their derivatives itself.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ekfac.layers import Coverage, Layer
    from ekfac.record import Record


@dataclass(frozen=True, kw_only=True)
class Products:
    """What a forward pass multiplies."""

    of_token: int  # multiplications for each token, which is mostly by weights
    of_pair: int  # for each pair of tokens: twice the heads × their dimension, over all blocks
    heads: frozenset[str]  # the embeddings that are multiplied by
    tied: frozenset[str]  # of these, those that are looked up too


class Backend(nn.Module):
    """A model whose computation is not torch's. `model(input_ids=…, use_cache=False).logits` has a gradient within `capture`.

    It has one by the parameters, too, where these need one, and a deep copy has parameters of its own: so it can be trained.
    """

    @abstractmethod
    def attributable(self, run: Callable[[nn.Module], Any], patterns: Sequence[str]) -> "Coverage":
        """As `ekfac.attributable_layers`."""

    @abstractmethod
    def capture(
        self,
        layers: "Sequence[Layer]",
        loss: Callable[[], Tensor],
        mask: Tensor,
        consume: "Callable[[Layer, Record], None]",
    ) -> float:
        """As `ekfac.capture`; `loss` calls the model once."""

    @abstractmethod
    def on_output(self, name: str, hook: Callable[[Tensor], None]) -> "RemovableHandle":
        """Has `hook` called with what the layer or block of this name gives, [N, T, D], in every forward pass until the handle is removed.

        It has a gradient where the logits have one by capture. Raises ValueError for a name that is not among the `output_names`.
        """

    @abstractmethod
    def output_names(self) -> list[str]:
        """What `on_output` knows."""

    @abstractmethod
    def products(self) -> Products:
        """What a forward pass costs, from shapes alone."""

    @abstractmethod
    def directional(self, layers: "Sequence[Layer]", tokens: Tensor, vector: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits [N, T, V], and their derivative along a vector [O, J] by layer."""

    @abstractmethod
    def gauss_newton(self, layers: "Sequence[Layer]", tokens: Tensor, weights: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `ekfac.gauss_newton_product`; `weights` [N, T] of the tokens' losses are zero for those that are not predicted."""

    @abstractmethod
    def parameter_names(self, layer: "Layer") -> tuple[str, str | None]:
        """As `ekfac.parameters.parameter_names`."""

    @abstractmethod
    def as_parameters(self, layers: "Sequence[Layer]", vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `ekfac.as_parameters`; parameters of layers that are not named are zero where they share a tensor."""

    @abstractmethod
    def as_vectors(self, layers: "Sequence[Layer]", parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `ekfac.as_vectors`."""

    @abstractmethod
    def get_input_embeddings(self) -> Any:
        """Something whose `weight` has a row for each token that the model knows."""
