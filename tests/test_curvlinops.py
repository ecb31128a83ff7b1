"""With true labels in place of drawn ones, EK-FAC of a dense and of a convolutional network equals that of curvlinops and of kronfluence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ekfac import Covariance, LayerFactors, attributable_layers, covariance_pass, fit
from ekfac.parameters import as_parameters, as_vectors

COUNT, CLASSES = 9, 3


def dense_network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES))


def convolutional_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )


NETWORKS = {"dense": (dense_network, (5,)), "convolutional": (convolutional_network, (2, 7, 5))}


def made(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        return model, torch.randn((COUNT, *shape), dtype=torch.float64), torch.randint(0, CLASSES, (COUNT,))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def every(batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.ones(len(batch[1]), dtype=torch.bool)


def product(factors: dict[str, LayerFactors], vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """G v, without damping."""
    return {name: factors[name].unrotate(factors[name].rotate(vector) * factors[name].eigenvalues) for name, vector in vectors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_products_equal_those_of_curvlinops(kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed (the README's test command installs it)")
    model, x, y = made(kind)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    factors, coverage = fit(model, batches, loss=loss, mask=every)
    assert coverage.share == 1
    theirs: Any = curvlinops.EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(model.parameters()),
        batches,
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        separate_weight_and_bias=False,
    )
    parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = product(factors, as_vectors(model, coverage.layers, parameters))
    expected = theirs @ list(parameters.values())
    for (name, mine), other in zip(as_parameters(model, coverage.layers, found).items(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12, msg=name)


class Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_covariances_and_eigenvalues_equal_those_of_kronfluence(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("kronfluence", reason="kronfluence is not installed (the README's test command installs it)")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return loss(model, batch)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return loss(model, batch)

    model, x, y = made(kind)
    layers = attributable_layers(model, lambda m: m(x)).layers
    covariances = covariance_pass(model, layers, [(x, y)], loss, every)
    factors, _ = fit(model, [(x, y)], loss=loss, mask=every)
    exact = torch.float64
    peer = Analyzer(
        analysis_name="peer", model=prepare_model(made(kind)[0], Classification()), task=Classification(), cpu=True, disable_tqdm=True,
        output_dir=str(tmp_path),
    )  # fmt: skip
    settings = FactorArguments(
        use_empirical_fisher=True,
        activation_covariance_dtype=exact,
        gradient_covariance_dtype=exact,
        eigendecomposition_dtype=exact,
        per_sample_gradient_dtype=exact,
        lambda_dtype=exact,
    )
    peer.fit_all_factors("factors", Pictures(x, y), per_device_batch_size=4, factor_args=settings)
    theirs, eigenvalues = peer.load_covariance_matrices("factors"), peer.load_lambda_matrices("factors")
    for layer in layers:
        for name, key in ((layer.input_name, "activation"), (layer.output_name, "gradient")):
            ours: Covariance = covariances[str(name)]
            whole = ours.total.triu() + ours.total.triu(1).T
            torch.testing.assert_close(
                whole / ours.num_positions,
                theirs[f"{key}_covariance"][layer.name] / theirs[f"num_{key}_covariance_processed"][layer.name],
                rtol=1e-9,
                atol=1e-12,
            )
        corrected = eigenvalues["lambda_matrix"][layer.name] / eigenvalues["num_lambda_processed"][layer.name]
        # axes of equal eigenvalues are any basis of theirs: sums over them agree
        torch.testing.assert_close(factors[layer.name].eigenvalues.sum(), corrected.sum(), rtol=1e-9, atol=1e-12)
