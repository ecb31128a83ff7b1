"""Gauss-Newton products and conjugate gradients against dense float64 matrices."""

import pytest
import torch
from conftest import padded_batch, tiny_model
from torch import Tensor, nn

from ekfac import SequenceBatch, attributable_layers, conjugate_gradients, fit, gauss_newton_product
from ekfac.layers import Layer
from ekfac.parameters import as_parameters, as_vectors


def layers_of(model: nn.Module, *patterns: str) -> tuple[Layer, ...]:
    return attributable_layers(model, lambda m: m(input_ids=torch.arange(1, 6)[None], use_cache=False), patterns or ("*",)).layers


def random_vectors(layers: tuple[Layer, ...], num_queries: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.randn((num_queries, *layer.shape), dtype=torch.float64, generator=generator) for layer in layers}


def flat(vectors: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector.flatten(1) for vector in vectors.values()], 1)


def unflat(matrix: Tensor, layers: tuple[Layer, ...]) -> dict[str, Tensor]:
    parts = matrix.split([layer.shape[0] * layer.shape[1] for layer in layers], 1)
    return {layer.name: part.reshape(-1, *layer.shape) for layer, part in zip(layers, parts, strict=True)}


def dense_gauss_newton(model: nn.Module, layers: tuple[Layer, ...], batch: SequenceBatch) -> Tensor:
    """Σ JᵀHJ with J row by row from plain backward passes."""
    names = list(as_parameters(model, layers, random_vectors(layers, 1)))
    parameters = [model.get_parameter(name) for name in names]
    total = torch.zeros(())
    for n in range(len(batch.tokens)):
        logits = model(input_ids=batch.tokens[n : n + 1], use_cache=False).logits[0]
        for t in batch.counted[n].nonzero()[:, 0].tolist():
            rows = []
            for value in logits[t - 1]:
                found = torch.autograd.grad(value, parameters, retain_graph=True)
                rows.append(flat(as_vectors(model, layers, {name: part[None] for name, part in zip(names, found, strict=True)}))[0])
            jacobian, p = torch.stack(rows), logits[t - 1].detach().softmax(-1)
            total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total


def test_products_equal_the_dense_gauss_newton_matrix(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = layers_of(model)
    batch = padded_batch(lengths=(5, 3), num_positions=5, prompt=2)
    vectors = random_vectors(layers, 3)
    found = flat(gauss_newton_product(model, layers, batch, vectors))
    expected = flat(vectors) @ dense_gauss_newton(model, layers, batch)
    tolerance = 1e-10 if architecture in ("gpt2", "neox", "phi") else 1e-5  # the norms of the others compute in float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_products_over_some_layers_are_that_block() -> None:
    model = tiny_model("llama")
    some, batch = layers_of(model, "*.mlp.*", "*norm*"), padded_batch(lengths=(4,), num_positions=4)
    vectors = random_vectors(some, 2)
    expected = flat(vectors) @ dense_gauss_newton(model, some, batch)
    torch.testing.assert_close(
        flat(gauss_newton_product(model, some, batch, vectors)), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("damping", [pytest.param(1e-2, marks=pytest.mark.slow), 1.0])
def test_conjugate_gradients_solve_the_damped_system_for_all_queries_at_once(damping: float) -> None:
    model, batch = tiny_model("gpt2"), padded_batch(lengths=(5, 4), num_positions=5)
    factors, coverage = fit(model, [batch])
    layers = tuple(layer for layer in coverage.layers if layer.name.endswith(("ln_f", "1.mlp.c_proj", "1.attn.c_proj")))
    right = random_vectors(layers, 4)
    dense = dense_gauss_newton(model, layers, batch) / 2
    expected = torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=torch.float64), flat(right).T).T

    def product(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = gauss_newton_product(model, layers, batch, vectors)
        return {name: found[name] / 2 + damping * vectors[name] for name in vectors}

    def precondition(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: factors[name].precondition(vector) for name, vector in vectors.items()}

    solution = conjugate_gradients(right, product, precondition, tolerance=1e-9, max_steps=300)
    assert (solution.residuals[-1] <= 1e-9).all()
    torch.testing.assert_close(flat(solution.vectors), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def quadratic(sizes: tuple[int, ...] = (3, 40)) -> tuple[Tensor, Tensor]:
    """A positive definite matrix, and right-hand sides in subspaces of these dimensions, which take as many steps."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn((50, 50), dtype=torch.float64, generator=generator))
    matrix = axes @ torch.diag(torch.logspace(0, 2, 50, dtype=torch.float64)) @ axes.T
    return matrix, torch.stack([axes[:, :size].sum(1) for size in sizes])


def test_a_query_that_is_done_takes_no_further_part_and_stays_as_it_was() -> None:
    matrix, right = quadratic()
    asked: list[int] = []

    def product(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked.append(len(vectors["x"]))
        return {"x": (vectors["x"][:, 0] @ matrix)[:, None]}

    def same(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        return vectors

    both = conjugate_gradients({"x": right[:, None]}, product, same, tolerance=1e-6, max_steps=100)
    assert asked[0] == 2
    assert asked[-1] == 1
    assert asked.index(1) == 3
    for n in range(2):
        alone = conjugate_gradients({"x": right[n : n + 1, None]}, product, same, tolerance=1e-6, max_steps=100)
        torch.testing.assert_close(alone.vectors["x"][0], both.vectors["x"][n], rtol=1e-9, atol=1e-12)
        left = right[n] - both.vectors["x"][n, 0] @ matrix
        assert float(left.norm() / right[n].norm()) == pytest.approx(float(both.residuals[-1, n]), abs=1e-9)
    assert asked[: len(both.residuals) - 1] == [2] * 3 + [1] * (len(both.residuals) - 4)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_answer_has_the_smallest_residual_that_so_many_products_allow(steps: int) -> None:
    """Against least squares over the Krylov space, in the norm of the preconditioner; the residual that is told is the answer's own."""
    generator = torch.Generator().manual_seed(1)
    root, right = (
        torch.randn(40, 30, dtype=torch.float64, generator=generator),
        torch.randn(3, 30, dtype=torch.float64, generator=generator),
    )
    matrix = root.T @ root / 40 + 0.01 * torch.eye(30, dtype=torch.float64)
    diagonal = torch.rand(30, dtype=torch.float64, generator=generator) + 0.2  # of the preconditioner
    solution = conjugate_gradients(
        {"x": right[:, None]}, lambda v: {"x": v["x"] @ matrix}, lambda v: {"x": v["x"] * diagonal}, tolerance=0, max_steps=steps
    )
    for n, b in enumerate(right):
        basis = [diagonal * b]
        for _ in range(steps - 1):
            basis.append(diagonal * (matrix @ basis[-1]))
        space = torch.linalg.qr(torch.stack(basis, 1))[0]
        weighted, target = diagonal.sqrt()[:, None] * (matrix @ space), diagonal.sqrt() * b
        expected = space @ torch.linalg.lstsq(weighted, target[:, None]).solution[:, 0]
        found = solution.vectors["x"][n, 0]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        residual = (diagonal.sqrt() * (b - matrix @ found)).norm() / target.norm()
        torch.testing.assert_close(solution.residuals[-1, n], residual, rtol=1e-6, atol=0)
    assert (solution.residuals.diff(dim=0) < 0).all()


def test_a_query_without_a_gradient_has_the_answer_zero() -> None:
    matrix, right = quadratic((5,))
    both = torch.cat([right, torch.zeros_like(right)])[:, None]
    solution = conjugate_gradients({"x": both}, lambda v: {"x": v["x"] @ matrix}, lambda v: v, tolerance=1e-6, max_steps=3)
    assert solution.vectors["x"][1].abs().max() == 0
    assert solution.residuals[:, 1].max() == 0


def test_steps_are_limited() -> None:
    matrix, right = quadratic()
    solution = conjugate_gradients({"x": right[:, None]}, lambda v: {"x": v["x"] @ matrix}, lambda v: v, tolerance=0, max_steps=4)
    assert len(solution.residuals) == 5


def test_system_that_is_not_positive_definite_is_refused() -> None:
    _, right = quadratic()
    with pytest.raises(ValueError, match="not positive definite"):
        conjugate_gradients({"x": right[:, None]}, lambda v: {"x": -v["x"]}, lambda v: v, tolerance=0, max_steps=2)
