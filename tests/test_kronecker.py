"""EK-FAC in arrays against dense matrices, in every array library that may call it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ekfac import Covariance, Damping, EigenvalueSum, LayerIO, eigenbasis, inner_products, layer_factors, position_inner_products
from ekfac.kronecker import Eigenbasis, eigenvalue_sum, feature_covariance, input_covariance, output_covariance
from ekfac.record import EmbeddingIO, LookupIO, ScaleIO, gradient_blocks, sequence_gradients

N, T, INPUTS, OUTPUTS = 5, 4, 3, 6
Make = Callable[[np.ndarray], Any]


def jax_arrays(values: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(values)


LIBRARIES: dict[str, Make] = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jax_arrays}


@pytest.fixture(params=list(LIBRARIES))
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    with everything_in_float64() if request.param == "jax" else nullcontext():
        yield LIBRARIES[request.param]


def everything_in_float64() -> AbstractContextManager[None]:
    import jax

    return jax.enable_x64(True)


def blocks_of(numbers: int, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many numbers of gradients at once; elsewhere than on a CPU, which JAX's arrays count as, there are sixteen times as many."""
    monkeypatch.setattr("ekfac.record.BLOCK_NUMBERS", numbers / 16 if make is jax_arrays else numbers)


def raw_record(seed: int = 0, num_positions: int = T, outputs: int = OUTPUTS) -> dict[str, np.ndarray]:
    """Positions at the end of some sequences are not reached: their output gradient is zero, their activation is not."""
    rng = np.random.default_rng(seed)
    lengths = np.array([num_positions, num_positions - 1, 1, num_positions, 0])
    mask = np.arange(num_positions)[None] < lengths[:, None]
    return {
        "activations": rng.normal(size=(N, num_positions, INPUTS)),
        "output_gradients": rng.normal(size=(N, num_positions, outputs)) * mask[:, :, None],
        "mask": mask,
    }


def record_of(raw: dict[str, np.ndarray], make: Make, bias: bool) -> LayerIO:
    return LayerIO(**{name: make(values) for name, values in raw.items()}, bias=bias)


def dense_gradients(raw: dict[str, np.ndarray], bias: bool) -> np.ndarray:
    """[N, O, J] by explicit loops over positions."""
    inputs = INPUTS + bias
    gradients = np.zeros((N, raw["output_gradients"].shape[2], inputs))
    for n in range(N):
        for t in range(raw["mask"].shape[1]):
            gradients[n] += np.outer(raw["output_gradients"][n, t], np.append(raw["activations"][n, t], [1.0] * bias))
    return gradients


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("panel", [512, 2])  # columns at once: all, and several panels
def test_covariances_are_sums_over_counted_positions_only(make: Make, bias: bool, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekfac.kronecker.PANEL", panel)
    raw = raw_record()
    record = record_of(raw, make, bias)
    inputs, outputs = np.zeros((INPUTS + bias,) * 2), np.zeros((OUTPUTS, OUTPUTS))
    for n, t in zip(*np.nonzero(raw["mask"]), strict=True):
        extended = np.append(raw["activations"][n, t], [1.0] * bias)
        inputs += np.outer(extended, extended)
        outputs += np.outer(raw["output_gradients"][n, t], raw["output_gradients"][n, t])
    found = input_covariance(record)
    assert found.num_positions == raw["mask"].sum() == output_covariance(record).num_positions
    np.testing.assert_allclose(np.triu(found.total), np.triu(inputs), atol=1e-12)
    np.testing.assert_allclose(np.triu(output_covariance(record).total), np.triu(outputs), atol=1e-12)
    values, vectors = np.linalg.eigh(inputs / raw["mask"].sum())
    basis = eigenbasis(found)
    np.testing.assert_allclose(np.asarray(basis.values), values, atol=1e-12)
    np.testing.assert_allclose(np.abs(np.asarray(basis.vectors).T @ vectors), np.eye(INPUTS + bias), atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_positions", [2, 40])  # below and above the length at which rotating gradients becomes cheaper
@pytest.mark.parametrize("numbers", [10**6, 45])  # one block, and blocks of two or three rows
def test_rotated_gradients_and_eigenvalues_equal_dense_ones(
    make: Make, bias: bool, num_positions: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(numbers, make, monkeypatch)
    raw = raw_record(num_positions=num_positions)
    record = record_of(raw, make, bias)
    input_vectors = np.linalg.qr(np.random.default_rng(1).normal(size=(INPUTS + bias,) * 2))[0]
    output_vectors = np.linalg.qr(np.random.default_rng(2).normal(size=(OUTPUTS, OUTPUTS)))[0]
    gradients = dense_gradients(raw, bias)
    expected = np.stack([output_vectors.T @ gradient @ input_vectors for gradient in gradients])
    np.testing.assert_allclose(np.asarray(sequence_gradients(record)), gradients, atol=1e-12)
    rotated = [np.asarray(block) for _, block in gradient_blocks(record, make(input_vectors), make(output_vectors))]
    assert all(block.size <= numbers for block in rotated)
    assert len(rotated) == 1 or numbers == 45
    np.testing.assert_allclose(np.concatenate(rotated, axis=1), expected, atol=1e-12)
    sums = eigenvalue_sum(record, make(input_vectors), make(output_vectors), (OUTPUTS, INPUTS + bias))
    assert sums.num_sequences == N
    np.testing.assert_allclose(np.asarray(sums.total), (expected**2).sum(0), atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("numbers", [10**6, 45])
def test_inner_products_equal_dense_ones_and_split_by_position(
    make: Make, bias: bool, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of(numbers, make, monkeypatch)
    raw = raw_record()
    record = record_of(raw, make, bias)
    vectors = np.random.default_rng(3).normal(size=(2, OUTPUTS, INPUTS + bias))
    expected = np.einsum("qoj,noj->qn", vectors, dense_gradients(raw, bias))
    np.testing.assert_allclose(np.asarray(inner_products(record, make(vectors))), expected, atol=1e-12)
    shares = np.asarray(position_inner_products(record, make(vectors[0])))
    np.testing.assert_allclose(shares.sum(1), expected[0], atol=1e-12)
    assert np.abs(shares[~raw["mask"]]).max() == 0


def factors_of(make: Make, damping: Damping, zero: bool = False) -> tuple[Any, np.ndarray]:
    """Factors of random covariances, and their dense (G + λI) with weights in row-major order [O·J]."""
    rng = np.random.default_rng(4)
    bases = []
    for size in (INPUTS, OUTPUTS):
        root = rng.normal(size=(size, size))
        bases.append(eigenbasis(Covariance(total=make(root @ root.T), num_positions=7)))
    squares = np.zeros((OUTPUTS, INPUTS)) if zero else rng.exponential(size=(OUTPUTS, INPUTS)) ** 4
    factors = layer_factors(bases[0], bases[1], EigenvalueSum(total=make(squares), num_sequences=3), damping, "float64")
    axes = np.kron(np.asarray(bases[1].vectors), np.asarray(bases[0].vectors))
    dense = axes @ np.diag(squares.ravel() / 3) @ axes.T
    return factors, dense + factors.damping * np.eye(OUTPUTS * INPUTS)


@pytest.mark.parametrize("damping", [Damping(value=0.1), Damping(value=1e-3, kind="absolute")])
def test_precondition_matches_dense_inverse(make: Make, damping: Damping) -> None:
    factors, dense = factors_of(make, damping)
    gradients = np.random.default_rng(5).normal(size=(2, OUTPUTS, INPUTS))
    expected = np.linalg.solve(dense, gradients.reshape(2, -1).T).T.reshape(gradients.shape)
    np.testing.assert_allclose(np.asarray(factors.precondition(make(gradients))), expected, rtol=1e-9)


def test_inner_product_of_whitened_gradients_is_damped_influence(make: Make) -> None:
    factors, dense = factors_of(make, Damping(value=0.1))
    left, right = np.random.default_rng(6).normal(size=(2, OUTPUTS, INPUTS))
    whitened = np.asarray(factors.whiten(make(np.stack([left, right])))).reshape(2, -1)
    assert whitened[0] @ whitened[1] == pytest.approx(left.ravel() @ np.linalg.solve(dense, right.ravel()), rel=1e-9)


def test_damping_is_relative_to_the_mean_corrected_eigenvalue() -> None:
    eigenvalues = np.array([[1.0, 2.0], [3.0, 6.0]])
    assert Damping(value=0.1).of(eigenvalues) == pytest.approx(0.3)
    assert Damping(value=0.1, kind="absolute").of(eigenvalues) == 0.1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_damping_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        Damping(value=value)


def test_effective_dimension_is_the_mean_squared_norm_of_whitened_gradients(make: Make) -> None:
    raw = raw_record()
    record = record_of(raw, make, False)
    input_basis, output_basis = eigenbasis(input_covariance(record)), eigenbasis(output_covariance(record))
    sums = eigenvalue_sum(record, input_basis.vectors, output_basis.vectors, (OUTPUTS, INPUTS))
    factors = layer_factors(input_basis, output_basis, sums, Damping(value=0.1), "float64")
    whitened = np.asarray(factors.whiten(make(dense_gradients(raw, False))))
    assert factors.effective_dimension() == pytest.approx((whitened**2).sum() / N, rel=1e-9)


def test_layer_without_curvature_gives_zero_not_nan(make: Make) -> None:
    factors, _ = factors_of(make, Damping(value=0.1), zero=True)
    gradients = make(np.ones((1, OUTPUTS, INPUTS)))
    assert np.abs(np.asarray(factors.precondition(gradients))).max() == 0
    assert np.abs(np.asarray(factors.whiten(gradients))).max() == 0
    assert factors.effective_dimension() == 0


def test_singular_covariance_has_an_orthonormal_eigenbasis_of_fixed_signs(make: Make) -> None:
    direction = np.array([1.0, -2.0, 0.5])
    basis = eigenbasis(Covariance(total=make(np.outer(direction, direction)), num_positions=1))
    vectors = np.asarray(basis.vectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors[:, -1], -direction / np.linalg.norm(direction), atol=1e-12)  # its largest entry is positive
    np.testing.assert_allclose(np.asarray(basis.values), [0, 0, direction @ direction], atol=1e-12)


def test_partial_sums_merge_to_the_whole(make: Make) -> None:
    raw = raw_record()
    whole = record_of(raw, make, True)
    parts = [record_of({name: values[piece] for name, values in raw.items()}, make, True) for piece in (slice(0, 2), slice(2, N))]
    expected = input_covariance(whole)
    for merged in (input_covariance(parts[0]) + input_covariance(parts[1]), input_covariance(parts[1], input_covariance(parts[0]))):
        assert merged.num_positions == expected.num_positions
        np.testing.assert_allclose(np.asarray(merged.total), np.asarray(expected.total), atol=1e-12)


def test_basis_of_no_positions_is_the_identity(make: Make) -> None:
    basis = eigenbasis(Covariance(total=make(np.zeros((3, 3))), num_positions=0))
    np.testing.assert_array_equal(np.asarray(basis.vectors), np.eye(3))
    np.testing.assert_array_equal(np.asarray(basis.values), np.zeros(3))


def test_nothing_counted_and_non_finite_statistics_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="not finite"):
        eigenbasis(Covariance(total=make(np.full((2, 2), np.nan)), num_positions=1))
    basis = Eigenbasis(values=make(np.ones(2)), vectors=make(np.eye(2)))
    with pytest.raises(ValueError, match="at least one sequence"):
        layer_factors(basis, basis, EigenvalueSum(total=make(np.zeros((2, 2))), num_sequences=0), Damping(value=0.1))
    with pytest.raises(ValueError, match="not finite"):
        layer_factors(basis, basis, EigenvalueSum(total=make(np.full((2, 2), np.inf)), num_sequences=1), Damping(value=0.1))


def table_record(make: Make, lookup: bool, head: bool, bias: bool) -> tuple[EmbeddingIO, np.ndarray, np.ndarray]:
    """A table of 11 rows and 4 features; the gradients [N, 11, J] and the shares of positions [N, T, 11, J], by loops."""
    rng = np.random.default_rng(8)
    num_sequences, num_positions, num_rows, features = 3, 6, 11, 4
    indices = rng.integers(0, num_rows, (num_sequences, num_positions))
    indices[0, :3] = 7  # a token that occurs several times
    mask = np.arange(num_positions) < np.array([6, 3, 0])[:, None]
    rows, hidden = rng.normal(size=(2, num_sequences, num_positions, features)) * mask[:, :, None]
    outputs = rng.normal(size=(num_sequences, num_positions, num_rows)) * mask[:, :, None]
    shares = np.zeros((num_sequences, num_positions, num_rows, features + bias))
    for n, t in zip(*np.nonzero(mask), strict=True):
        if lookup:
            shares[n, t, indices[n, t], :features] += rows[n, t]
        if head:
            shares[n, t] += np.outer(outputs[n, t], np.append(hidden[n, t], [1.0] * bias))
    linear = LayerIO(activations=make(hidden), output_gradients=make(outputs), mask=make(mask), bias=bias)
    record = EmbeddingIO(
        lookup=LookupIO(indices=make(indices), row_gradients=make(rows)) if lookup else None,
        head=linear if head else None,
        mask=make(mask),
        num_rows=num_rows,
    )
    return record, shares.sum(1), shares


@pytest.mark.parametrize("numbers", [10**6, 25])  # one block, and blocks of two rows
@pytest.mark.parametrize(("lookup", "head", "bias"), [(True, False, False), (False, True, True), (True, True, False), (True, True, True)])
def test_tables_equal_dense_ones(make: Make, lookup: bool, head: bool, bias: bool, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(numbers, make, monkeypatch)
    record, gradients, shares = table_record(make, lookup, head, bias)
    np.testing.assert_allclose(np.asarray(sequence_gradients(record)), gradients, atol=1e-12)
    vectors = np.random.default_rng(9).normal(size=(2, *gradients.shape[1:]))
    expected = np.einsum("qoj,noj->qn", vectors, gradients)
    np.testing.assert_allclose(np.asarray(inner_products(record, make(vectors))), expected, atol=1e-12)
    by_position = np.einsum("oj,ntoj->nt", vectors[0], shares)
    np.testing.assert_allclose(np.asarray(position_inner_products(record, make(vectors[0]))), by_position, atol=1e-12)
    features = np.linalg.qr(np.random.default_rng(10).normal(size=(gradients.shape[2],) * 2))[0]
    sums = eigenvalue_sum(record, make(features), None, gradients.shape[1:])
    np.testing.assert_allclose(np.asarray(sums.total), ((gradients @ features) ** 2).sum(0), atol=1e-11)
    assert all(np.asarray(block).size <= max(numbers, 3 * gradients.shape[2]) for _, block in gradient_blocks(record))
    if not (lookup and head):  # of a tied table the two uses are added without their cross terms
        covariance = feature_covariance(record)
        np.testing.assert_allclose(np.triu(covariance.total), np.triu(np.einsum("ntoi,ntoj->ij", shares, shares)), atol=1e-11)


def test_table_without_a_counted_position_has_no_gradient(make: Make) -> None:
    record, _, _ = table_record(make, True, False, False)
    empty = replace(record, mask=make(np.zeros((3, 6), dtype=bool)))
    assert np.asarray(eigenvalue_sum(empty, None, None, (11, 4)).total).max() == 0
    assert np.abs(np.asarray(inner_products(empty, make(np.ones((1, 11, 4)))))).max() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_scales_equal_dense_ones(make: Make, bias: bool) -> None:
    rng = np.random.default_rng(11)
    normalized, outputs = rng.normal(size=(2, 3, 5, 2, 4))
    record = ScaleIO(normalized=make(normalized), output_gradients=make(outputs), mask=make(np.ones((3, 5), dtype=bool)), bias=bias)
    shares = np.stack([(normalized * outputs).sum(2), outputs.sum(2)], axis=-1)[..., : 1 + bias]
    np.testing.assert_allclose(np.asarray(sequence_gradients(record)), shares.sum(1), atol=1e-12)
    vector = rng.normal(size=(4, 1 + bias))
    np.testing.assert_allclose(np.asarray(position_inner_products(record, make(vector))), (shares * vector).sum((2, 3)), atol=1e-12)
    np.testing.assert_allclose(np.asarray(eigenvalue_sum(record, None, None, vector.shape).total), (shares.sum(1) ** 2).sum(0), atol=1e-11)
