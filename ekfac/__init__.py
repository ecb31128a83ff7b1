"""EK-FAC factors of the layers of a torch or JAX model, usable alone: capture, Kronecker factors, corrected eigenvalues, (G + λI)⁻¹v.

JAX is imported by `ekfac.jax_marks`, `jax_tape`, `jax_model`, `flax_linen` and `flax_nnx` only, which are imported by whoever has a JAX model. Knows
nothing of files, indexes, Ray or reports.
"""

from ekfac.backend import Backend
from ekfac.capture import capture
from ekfac.fit import assemble, covariance_pass, eigenvalue_pass, fit, merge, of, reached_positions
from ekfac.gauss_newton import Solution, Vectors, conjugate_gradients, gauss_newton_product
from ekfac.hashing import key_of, keyed_bits, keyed_uniforms
from ekfac.kronecker import Covariance, Damping, Eigenbasis, EigenvalueSum, LayerFactors, corrected_eigenvalues, eigenbasis, layer_factors
from ekfac.language import (
    Loss,
    SequenceBatch,
    at_each_counted,
    drawn_label_loss,
    losses_by,
    sequence_weights,
    token_losses,
    true_label_loss,
    weighted,
)
from ekfac.layers import Coverage, Layer, attributable_layers, evaluation_mode, layer_device, matches
from ekfac.parameters import as_parameters, as_vectors
from ekfac.projections import Split
from ekfac.record import (
    BLOCK_NUMBERS,
    Array,
    EmbeddingIO,
    GroupedIO,
    LayerIO,
    LookupIO,
    Record,
    Rows,
    ScaleIO,
    as_one_sequence,
    gradient_blocks,
    inner_products,
    position_inner_products,
    sequence_gradients,
)
from ekfac.token_derivatives import token_loss_derivatives

__all__ = [
    "BLOCK_NUMBERS",
    "Array",
    "Backend",
    "Covariance",
    "Coverage",
    "Damping",
    "Eigenbasis",
    "EigenvalueSum",
    "EmbeddingIO",
    "GroupedIO",
    "Layer",
    "LayerFactors",
    "LayerIO",
    "LookupIO",
    "Loss",
    "Record",
    "Rows",
    "ScaleIO",
    "SequenceBatch",
    "Solution",
    "Split",
    "Vectors",
    "as_one_sequence",
    "as_parameters",
    "as_vectors",
    "assemble",
    "at_each_counted",
    "attributable_layers",
    "capture",
    "conjugate_gradients",
    "corrected_eigenvalues",
    "covariance_pass",
    "drawn_label_loss",
    "eigenbasis",
    "eigenvalue_pass",
    "evaluation_mode",
    "fit",
    "gauss_newton_product",
    "gradient_blocks",
    "inner_products",
    "key_of",
    "keyed_bits",
    "keyed_uniforms",
    "layer_device",
    "layer_factors",
    "losses_by",
    "matches",
    "merge",
    "of",
    "position_inner_products",
    "reached_positions",
    "sequence_gradients",
    "sequence_weights",
    "token_loss_derivatives",
    "token_losses",
    "true_label_loss",
    "weighted",
]
