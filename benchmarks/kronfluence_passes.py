"""The seconds of each pass of kronfluence's EK-FAC, also as multiples of F (`passes.py`), each at its best batch size, and its memory.

    python benchmarks/kronfluence_passes.py FOLDER --json FILE.json [--queries 256] [--batch-sizes 8 16 32 64] [--repeats 3] [--scores FILE.npy]

in an environment of its own:

    pip install torch==2.13.0 numpy transformers==5.23.0 accelerate einops einconv opt_einsum && pip install --no-deps kronfluence==1.0.1

(its dependencies would bring torchvision, whose registry build does not load beside the CPU build of torch). Attributed are the four linear layers of
each block with their biases; all is float32, eigendecompositions float64; labels are drawn from the model; damping is 0.1 times the mean eigenvalue.

It calls the functions behind the Analyzer, which reads and writes a file between any two of them. What makes it fast without changing its scores:
no activation mask, as the last token, which predicts nothing, is not given to the model; labels drawn by binary search; one scan for all queries,
whose gradients accumulate (`query_gradient_accumulation_steps`), so that "scan" has them all in memory; the attention that is fastest for F.
"""

from importlib.metadata import version

import numpy as np
import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders
from kronfluence.task import Task
from kronfluence.utils.state import State
from kronfluence_scores import with_linear_layers
from peer_passes import Setting, Stage, clock, default_device, fastest, one_part, options, plain_stage, read_tokens, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel


def main() -> None:
    opts = options(__doc__.split("\n")[0])
    train, queries = read_tokens(opts.folder, opts.queries)
    plain = plain_stage(opts.folder, train)
    chosen = fastest(plain, passes=2)  # everything is divided by it
    torch.manual_seed(0)
    model = GPT2LMHeadModel.from_pretrained(opts.folder / "model", dtype=torch.float32, attn_implementation=str(chosen["F"]["attention"]))
    passes = Passes(with_linear_layers(model), train, queries)
    report(f"kronfluence {version('kronfluence')}", [plain, *passes.stages(opts.batch_sizes)], chosen, opts, len(train))
    if opts.scores:
        np.save(opts.scores, passes.scores.numpy())


class Passes:
    """kronfluence's passes over a model, each keeping what the next ones need."""

    def __init__(self, model: nn.Module, train: Tensor, queries: Tensor) -> None:
        self.train, self.queries = train, queries
        self.task = LanguageModelling(
            [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
        )
        self.state = State(cpu=default_device().type == "cpu")
        self.model = prepare_model(model, self.task).to(self.state.device)
        self.arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=False, has_shared_parameters=False)

    def stages(self, batch_sizes: list[int]) -> list[Stage]:
        sizes = [{"batch_size": size} for size in batch_sizes]
        return [
            one_part("covariances", sizes, self.fit_covariances),
            one_part("eigendecompositions", [{}], lambda *_: self.decompose()),
            one_part("eigenvalues", sizes, self.fit_eigenvalues),
            Stage(parts=("queries", "scan"), settings=sizes, run=self.score),
        ]

    def fit_covariances(self, setting: Setting, count: int) -> None:
        _, self.covariances = fit_covariance_matrices_with_loader(
            self.model, self.state, self.task, loader(self.train[:count], setting), self.arguments, disable_tqdm=True
        )

    def decompose(self) -> None:
        self.bases = perform_eigendecomposition(self.covariances, self.model, self.state, self.arguments, disable_tqdm=True)
        del self.covariances  # which the Analyzer does not hold either

    def fit_eigenvalues(self, setting: Setting, count: int) -> None:
        _, self.eigenvalues = fit_lambda_matrices_with_loader(
            self.model, self.state, self.task, loader(self.train[:count], setting), self.arguments, self.bases, disable_tqdm=True
        )

    def score(self, chosen: dict[str, Setting], count: int) -> dict[str, float]:
        """Sets `scores` [Q, count]. One call computes the queries' gradients and scans; the task tells when the scan begins."""
        query_batches, train_batches = loader(self.queries, chosen["queries"]), loader(self.train[:count], chosen["scan"])
        self.task.first_train_loss = None
        start = clock()
        scores = compute_pairwise_scores_with_loaders(
            {**self.bases, **self.eigenvalues},
            self.model,
            self.state,
            self.task,
            query_batches,
            int(chosen["queries"]["batch_size"]),
            train_batches,
            # damping_factor None is kronfluence's way to say 0.1 times the mean eigenvalue
            ScoreArguments(damping_factor=None, query_gradient_accumulation_steps=len(query_batches)),
            self.arguments,
            tracked_module_names=None,
            disable_tqdm=True,
        )
        end = clock()
        self.scores = scores["all_modules"].float().cpu()
        assert self.scores.shape == (len(self.queries), count), self.scores.shape
        assert self.task.first_train_loss is not None
        return {"queries": self.task.first_train_loss - start, "scan": end - self.task.first_train_loss}


class LanguageModelling(Task):
    """The summed loss of the next token. `first_train_loss` is when a loss with true labels was first asked for."""

    first_train_loss: float | None = None

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        if not sample and self.first_train_loss is None:
            self.first_train_loss = clock()
        logits = self.logits(batch, model)
        return cross_entropy(logits, drawn(logits) if sample else batch[:, 1:].flatten(), reduction="sum")

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        return cross_entropy(self.logits(batch, model), batch[:, 1:].flatten(), reduction="sum")

    def logits(self, batch: Tensor, model: nn.Module) -> Tensor:
        return model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


@torch.no_grad()
def drawn(logits: Tensor) -> Tensor:
    """A label for each row; `torch.multinomial` draws as many numbers as there are logits."""
    cumulative = logits.softmax(-1).cumsum(-1)
    thresholds = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def loader(tokens: Tensor, setting: Setting) -> DataLoader[Tensor]:
    return DataLoader(tokens, batch_size=int(setting["batch_size"]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
