"""With true labels in place of drawn ones, factors and pairwise scores equal kronfluence's on the same GPT-2."""

import copy
from typing import Any

import pytest
import torch
from conftest import padded_batch, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac import LayerFactors, SequenceBatch, fit, true_label_loss
from influence.attribution import AttributedModel, precondition, query_gradients, scan
from influence.batches import BatchBudget
from influence.measurement import Measurement
from influence.sequences import TrainingSequence

kronfluence = pytest.importorskip("kronfluence", reason="kronfluence is not installed (the README's test command installs it)")
pytestmark = [
    # kronfluence's own way of reading tensors and of timing its steps
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, batch: SequenceBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.batch.tokens[index], "counted": self.batch.counted[index]}


def as_batch(batch: dict[str, Tensor]) -> SequenceBatch:
    return SequenceBatch(tokens=batch["tokens"], counted=batch["counted"], keys=None)  # type: ignore[arg-type]


class Task(kronfluence.task.Task):  # type: ignore[misc]
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample
        return true_label_loss(model, as_batch(batch))

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return true_label_loss(model, as_batch(batch))

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return as_batch(batch).reached


def with_linear_layers(model: nn.Module) -> nn.Module:
    """kronfluence knows nn.Linear only."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, dtype=module.weight.dtype)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def arguments() -> tuple[Any, Any]:
    from kronfluence.arguments import FactorArguments, ScoreArguments

    exact = torch.float64
    factors = FactorArguments(
        use_empirical_fisher=True,
        activation_covariance_dtype=exact,
        gradient_covariance_dtype=exact,
        eigendecomposition_dtype=exact,
        per_sample_gradient_dtype=exact,
        lambda_dtype=exact,
    )
    scores = ScoreArguments(damping_factor=None, score_dtype=exact, per_sample_gradient_dtype=exact, precondition_dtype=exact)
    return factors, scores


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from kronfluence.analyzer import Analyzer, prepare_model

    model, train, queries = with_linear_layers(tiny_model("gpt2")), train_batch(), query_batch()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    factor_arguments, score_arguments = arguments()
    task = Task(names)
    analyzer = Analyzer(
        analysis_name="peer",
        model=prepare_model(model, task),
        task=task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(tmp_path_factory.mktemp("kronfluence")),
    )
    analyzer.fit_all_factors("factors", Sequences(train), per_device_batch_size=3, factor_args=factor_arguments)
    analyzer.compute_pairwise_scores(
        "scores", "factors", Sequences(queries), Sequences(train), per_device_query_batch_size=2, per_device_train_batch_size=3,
        score_args=score_arguments,
    )  # fmt: skip
    return {
        "scores": analyzer.load_pairwise_scores("scores")["all_modules"],
        "eigenvalues": analyzer.load_lambda_matrices("factors"),
        "bases": analyzer.load_eigendecomposition("factors"),
    }


def train_batch() -> SequenceBatch:
    return padded_batch(lengths=(7, 4, 5, 7, 3, 6, 7, 7), seed=1)


def query_batch() -> SequenceBatch:
    return padded_batch(lengths=(7, 5, 6), seed=2, prompt=3)


def sequences_of(batch: SequenceBatch) -> list[TrainingSequence]:
    return [
        TrainingSequence(id=str(n), document=str(n), tokens=tokens.numpy(), counted=counted.numpy(), text="", metadata={})
        for n, (tokens, counted) in enumerate(zip(batch.tokens, batch.counted, strict=True))
    ]


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, LayerFactors], Tensor]:
    model = tiny_model("gpt2")
    factors, coverage = fit(model, [train_batch()], loss=true_label_loss, layers=["*.attn.*", "*.mlp.*"])  # it knows linear layers only
    budget = BatchBudget(max_tokens=20, memory_bytes=10**9, bytes_per_token=1, bytes_per_sequence=1)
    attributed = AttributedModel(model=model, layers=coverage.layers, budget=budget, device=torch.device("cpu"))
    asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, sequence),)) for sequence in sequences_of(query_batch())]
    vectors = precondition(query_gradients(attributed, asked).gradients, factors)
    return factors, torch.from_numpy(scan(attributed, vectors, sequences_of(train_batch())))


def test_corrected_eigenvalues_equal_kronfluences(ours: tuple[dict[str, LayerFactors], Tensor], theirs: dict[str, Any]) -> None:
    counts, sums = theirs["eigenvalues"]["num_lambda_processed"], theirs["eigenvalues"]["lambda_matrix"]
    assert set(sums) == set(ours[0])
    for name, factor in ours[0].items():
        # Equal as a set: within an eigenspace of a singular covariance the order and the basis are open.
        expected = (sums[name] / counts[name]).flatten().sort().values
        torch.testing.assert_close(factor.eigenvalues.flatten().sort().values, expected, rtol=1e-6, atol=1e-9 * float(expected.max()))


def test_preconditioned_gradients_equal_those_of_kronfluences_factors(
    ours: tuple[dict[str, LayerFactors], Tensor], theirs: dict[str, Any]
) -> None:
    counts, sums = theirs["eigenvalues"]["num_lambda_processed"], theirs["eigenvalues"]["lambda_matrix"]
    for name, factor in ours[0].items():
        eigenvalues = sums[name] / counts[name]
        peer = LayerFactors(
            input_vectors=theirs["bases"]["activation_eigenvectors"][name],
            output_vectors=theirs["bases"]["gradient_eigenvectors"][name],
            eigenvalues=eigenvalues,
            damping=0.1 * float(eigenvalues.mean()),
        )
        gradient = torch.randn(eigenvalues.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(factor.precondition(gradient), peer.precondition(gradient), rtol=1e-6, atol=1e-8)


def test_pairwise_scores_equal_kronfluences(ours: tuple[dict[str, LayerFactors], Tensor], theirs: dict[str, Any]) -> None:
    assert theirs["scores"].shape == (3, 8)
    torch.testing.assert_close(ours[1], theirs["scores"].double(), rtol=1e-7, atol=1e-8 * float(ours[1].abs().max()))
