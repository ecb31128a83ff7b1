"""kronfluence's EK-FAC scores of a folder's queries, for `influence evaluate RUN lds --scores kronfluence=FILE.npy`, and its seconds.

    python benchmarks/kronfluence_scores.py FOLDER --out FILE.npy

FOLDER is laid out as for `lds.py`: `final/`, a GPT-2 model, and `train.jsonl` and `query.jsonl`, whose `input_ids` are all of one length. FILE gets
the scores [Q, N], float32, positive where training on the sequence lowers the query's loss. Attributed are the four linear layers of each block with
their biases; the loss is summed over the predicted tokens; factors come from labels drawn from the model, in float32 (eigendecomposition in
float64), damped by 0.1 times the mean eigenvalue of the layer. Seconds of fitting are its covariances, eigendecomposition and corrected eigenvalues;
those of scoring include the queries' gradients. Written for kronfluence 1.0.1.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--queries", type=int, default=25, help="how many of query.jsonl, from its start")
    parser.add_argument("--sequences", type=int, help="how many of train.jsonl, from its start; all by default")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at a time")
    options = parser.parse_args()
    train = read_tokens(options.folder / "train.jsonl", options.sequences)
    queries = read_tokens(options.folder / "query.jsonl", options.queries)
    torch.manual_seed(0)
    model = with_linear_layers(GPT2LMHeadModel.from_pretrained(options.folder / "final", dtype=torch.float32))
    task = LanguageModelling([name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"])
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            analysis_name="scores",
            model=prepare_model(model, task),
            task=task,
            cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            output_dir=folder,
        )
        start = time.perf_counter()
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=options.batch_size,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=False),
        )
        fitted = time.perf_counter()
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=options.batch_size,
            per_device_train_batch_size=options.batch_size,
            score_args=ScoreArguments(damping_factor=None),  # kronfluence's way to say 0.1 times the mean eigenvalue
        )
        scored = time.perf_counter()
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].float().cpu().numpy()
    assert scores.shape == (len(queries), len(train)), scores.shape
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(options.out, scores)
    print(f"kronfluence {version('kronfluence')}, {torch.get_num_threads()} threads: {len(queries)} queries, {len(train)} sequences")
    print(f"fitting {fitted - start:.1f} s, scoring {scored - fitted:.1f} s")


class Tokens(torch.utils.data.Dataset[Tensor]):
    def __init__(self, tokens_NT: Tensor) -> None:
        self.tokens_NT = tokens_NT

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens_NT[index]


def read_tokens(path: Path, count: int | None) -> Tokens:
    """The first `count` sequences of a file. `ValueError` unless all have one length: padding would ask for masks."""
    rows = [json.loads(line)["input_ids"] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"{path} has sequences of {sorted(lengths)} tokens; cut them to one length")
    return Tokens(torch.tensor(rows))


class LanguageModelling(Task):
    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), num_samples=1).squeeze(-1)
        else:
            labels = batch[:, 1:].flatten()
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers

    def get_attention_mask(self, batch: Tensor) -> Tensor:
        """All but the last position, which predicts nothing: its activation belongs to no gradient."""
        mask = torch.ones_like(batch)
        mask[:, -1] = 0
        return mask


def with_linear_layers(model: nn.Module) -> nn.Module:
    """The model, changed: kronfluence knows `nn.Linear` only."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, dtype=module.weight.dtype)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


if __name__ == "__main__":
    main()
