"""How a JAX model's parameters and the batches it is called with lie over several devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from ekfac.jax_torch import to_jax


@dataclass(frozen=True, kw_only=True)
class Layout:
    batches: NamedSharding | None  # of the sequences of a batch; None with one device

    @property
    def spread(self) -> int:
        """Over how many devices the sequences of a batch are dealt out."""
        if self.batches is None or not self.batches.spec or self.batches.spec[0] is None:
            return 1
        axes = self.batches.spec[0]
        return prod(self.batches.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    def dealt_out(self, values: Tensor) -> jax.Array:
        """What has a row for each sequence of a batch."""
        found = to_jax(values)
        return found if self.batches is None else jax.device_put(found, self.batches)

    def everywhere(self, values: Tensor) -> jax.Array:
        """A copy on every device."""
        found = to_jax(values)
        return found if self.batches is None else jax.device_put(found, NamedSharding(self.batches.mesh, PartitionSpec()))


def laid_out(parameters: Mapping[str, jax.Array], batches: NamedSharding | None) -> tuple[dict[str, jax.Array], Layout]:
    """The parameters where they are computed with, and how batches are laid over the devices.

    Parameters that lie on several devices stay as they are; others are copied to all that batches are laid over, or that there are.
    """
    values = {name: jnp.asarray(parameters[name]) for name in sorted(parameters)}
    meshes = [
        value.sharding.mesh for value in values.values() if isinstance(value.sharding, NamedSharding) and len(value.sharding.device_set) > 1
    ]
    if batches is None and meshes:
        batches = NamedSharding(meshes[0], PartitionSpec())
    if batches is None and len(jax.local_devices()) > 1:
        batches = NamedSharding(Mesh(np.array(jax.local_devices()), ("sequences",)), PartitionSpec("sequences"))
    if batches is not None:
        everywhere = NamedSharding(batches.mesh, PartitionSpec())
        values = {
            name: value if value.sharding.device_set == batches.device_set else jax.device_put(value, everywhere)
            for name, value in values.items()
        }
    return values, Layout(batches=batches)
