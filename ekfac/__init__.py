"""EK-FAC factors of a torch model's layers, usable alone: capture, Kronecker factors, corrected eigenvalues, (G + λI)⁻¹v.

Knows nothing of files, indexes, Ray or reports.
"""

from ekfac.capture import capture
from ekfac.fit import assemble, covariance_pass, eigenvalue_pass, fit, input_name, merge, output_name, reached_positions
from ekfac.hashing import key_of, keyed_bits, keyed_uniforms
from ekfac.kronecker import Covariance, Damping, Eigenbasis, EigenvalueSum, LayerFactors, eigenbasis, layer_factors, rotated_gradients
from ekfac.language import Loss, SequenceBatch, drawn_label_loss, token_losses, true_label_loss
from ekfac.layers import Coverage, Layer, attributable_layers, evaluation_mode
from ekfac.record import Array, LayerIO, inner_products, position_inner_products, sequence_gradients

__all__ = [
    "Array",
    "Covariance",
    "Coverage",
    "Damping",
    "Eigenbasis",
    "EigenvalueSum",
    "Layer",
    "LayerFactors",
    "LayerIO",
    "Loss",
    "SequenceBatch",
    "assemble",
    "attributable_layers",
    "capture",
    "covariance_pass",
    "drawn_label_loss",
    "eigenbasis",
    "eigenvalue_pass",
    "evaluation_mode",
    "fit",
    "inner_products",
    "input_name",
    "key_of",
    "keyed_bits",
    "keyed_uniforms",
    "layer_factors",
    "merge",
    "output_name",
    "position_inner_products",
    "reached_positions",
    "rotated_gradients",
    "sequence_gradients",
    "token_losses",
    "true_label_loss",
]
