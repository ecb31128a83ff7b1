"""Sharded over devices of the host, a JAX model gives what it gives on one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CALCULATE = """
import json, sys
import jax, numpy as np, torch
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from conftest import padded_batch
from flax_twins import VOCABULARY, Twin, flax_parameters, stacked, torch_twin
import ekfac
from ekfac.flax_linen import linen_model

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_x64", True)
found = padded_batch(lengths=(7, 4, 5, 7, 6))
batch = ekfac.SequenceBatch(tokens=found.tokens % VOCABULARY, counted=found.counted, keys=found.keys)
values, options = stacked(flax_parameters(torch_twin())), {}
if sys.argv[1] == "sharded":  # two groups of devices share the sequences, the two of each group the columns of the wide kernels
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    columns = {name: PartitionSpec(None, None, "model") for name in ("transformer.h.mlp.c_fc.kernel",)}
    values = {name: jax.device_put(value, NamedSharding(mesh, columns.get(name, PartitionSpec()))) for name, value in values.items()}
    options = {"batches": NamedSharding(mesh, PartitionSpec("data"))}
model = linen_model(Twin(layout="scanned"), {"params": unflatten_dict(values, sep=".")}, longest=20, **options)
factors, coverage = ekfac.fit(model, [batch])
vectors = {layer.name: torch.ones(1, *layer.shape, dtype=torch.float64) for layer in coverage.layers}
products = ekfac.gauss_newton_product(model, coverage.layers, batch, vectors)
print(json.dumps({
    "devices": len(model.values["transformer.h.mlp.c_fc.kernel"].sharding.device_set),
    "split": not model.values["transformer.h.mlp.c_fc.kernel"].is_fully_replicated,
    "eigenvalues": {name: one.eigenvalues.flatten().tolist() for name, one in factors.items()},
    "products": {name: one.flatten().tolist() for name, one in products.items()},
}))
"""


def calculated(layout: str, num_devices: int) -> Any:
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", CALCULATE, layout], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_several_devices_give_what_one_gives() -> None:
    """To the rounding of float64: sums over a batch are taken in another order."""
    alone = calculated("copied", 1)
    assert alone["devices"] == 1
    for layout, num_devices in (("copied", 3), ("sharded", 4)):
        shared = calculated(layout, num_devices)
        assert (shared["devices"], shared["split"]) == (num_devices, layout == "sharded")
        for kind in ("eigenvalues", "products"):
            for name, expected in alone[kind].items():
                largest = max(map(abs, expected))
                assert shared[kind][name] == pytest.approx(expected, rel=1e-7, abs=1e-9 * largest), (layout, kind, name)
