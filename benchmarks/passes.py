"""The seconds of each pass of the main job, also as multiples of F: a plain forward and backward pass with all weight gradients.

    python benchmarks/passes.py FOLDER --json FILE.json [--all] [--make 128] [--queries 16] [--repeats 3] [--scores FILE.npy]

FOLDER holds `model/` and `tokens.npy` as for `kronfluence_passes.py` and `bergson_passes.py`, which measure the others on the same folder; `--make`
writes them first: GPT-2's architecture with random weights, 6 layers of width 384, and so many sequences of 128 random tokens. Attributed are the
linear layers of the blocks, or with `--all` every parameter. Passes take turns with F; medians are reported, and the peak of memory of each.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from peer_passes import default_device, one_part, options, plain_stage, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac import (
    Covariance,
    Damping,
    Eigenbasis,
    EigenvalueSum,
    LayerFactors,
    assemble,
    attributable_layers,
    capture,
    covariance_pass,
    drawn_label_loss,
    eigenbasis,
    eigenvalue_pass,
    reached_positions,
    true_label_loss,
)
from indexing import RowFormat, feature_rows, feature_spec, is_mixed, row_length_within, spreaders
from influence.attribution import AttributedModel, query_gradients, scan, score_sequences, solve
from influence.batches import batch_budget, in_batches, model_memory
from influence.measurement import Measurement
from influence.model import fuse_activations
from influence.sequences import TrainingSequence


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--all", action="store_true", help="attribute every parameter, not only the linear layers of the blocks")
    own.add_argument("--make", type=int, help="write FOLDER first, with so many sequences")
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    opts = options((__doc__ or "").split("\n")[0])
    if mine.make:
        make_folder(opts.folder, mine.make)
    model = GPT2LMHeadModel.from_pretrained(opts.folder / "model", dtype=torch.float32).to(default_device()).eval()
    sequences = read_sequences(opts.folder)
    passes = Passes(model, sequences, opts.queries, ["*"] if mine.all else ["*.attn.*", "*.mlp.*"])
    plain = plain_stage(opts.folder, torch.from_numpy(np.stack([sequence.tokens for sequence in sequences]).astype(np.int64)))
    stages = [plain, *(one_part(name, [{}], lambda _setting, _count, work=work: work()) for name, work in passes.all().items())]
    report("this project", stages, {}, opts, len(sequences))
    if opts.scores:
        np.save(opts.scores, passes.scores)


def make_folder(folder: Path, count: int) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=384, n_layer=6, n_head=6, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 4096, (count, 128)).astype(np.int32))


def read_sequences(folder: Path) -> list[TrainingSequence]:
    rows = np.load(folder / "tokens.npy").astype(np.int32)
    counted = np.arange(rows.shape[1]) > 0
    return [TrainingSequence(id=str(n), document="", tokens=row, counted=counted, text="", metadata={}) for n, row in enumerate(rows)]


class Passes:
    """Every pass of the main job as a function without arguments, each using what the one before it has made."""

    covariances: dict[str, Covariance]
    bases: dict[str, Eigenbasis]
    sums: dict[str, EigenvalueSum]
    factors: dict[str, LayerFactors]
    vectors: dict[str, Tensor]
    scores: np.ndarray

    def __init__(self, model: GPT2LMHeadModel, sequences: list[TrainingSequence], num_queries: int, patterns: list[str]) -> None:
        fuse_activations(model)  # as when a run loads it; F is of the model as transformers gives it
        self.model, self.sequences = model, sequences
        device = default_device()
        example = torch.zeros((1, 2), dtype=torch.int64, device=device)
        self.layers = attributable_layers(model, lambda m: m(input_ids=example), patterns).layers
        budget = batch_budget(model_memory(model, self.layers), 16 * 2**30, len(sequences[0].tokens), device.type)
        self.attributed = AttributedModel(model=model, layers=self.layers, budget=budget, device=device)
        self.batches = [batch for _, batch in in_batches(sequences, budget, device)]
        asked: Iterable[TrainingSequence] = (sequences[n % len(sequences)] for n in range(num_queries))
        self.asked = [Measurement(prompt="", completion="", contrast=None, parts=((1.0, s),)) for s in asked]
        self.loss = drawn_label_loss(0)

    def all(self) -> dict[str, Callable[[], object]]:
        return {
            "capture": self.capture,
            "covariances": self.make_covariances,
            "eigendecompositions": self.make_bases,
            "eigenvalues": self.make_factors,
            "rows of 8 KiB": self.rows,
            "queries": self.make_vectors,
            "scan": self.scan,
            "rerank of all, with layers and tokens": self.rerank,
        }

    def capture(self) -> None:
        for batch in self.batches:
            capture(self.model, self.layers, lambda batch=batch: self.loss(self.model, batch), batch.reached, lambda *_: None)  # type: ignore[misc]

    def make_covariances(self) -> None:
        self.covariances = covariance_pass(self.model, self.layers, self.batches, self.loss, reached_positions)

    def make_bases(self) -> None:
        self.bases = {name: eigenbasis(covariance, "float32") for name, covariance in self.covariances.items()}

    def make_factors(self) -> None:
        vectors = {name: basis.vectors for name, basis in self.bases.items()}
        sums = eigenvalue_pass(self.model, self.layers, vectors, self.batches, self.loss, reached_positions)
        self.factors = assemble(self.layers, self.bases, sums, Damping(value=0.1))

    def rows(self) -> None:
        weights = {name: factor.row_weight() for name, factor in self.factors.items()}
        spec = feature_spec(self.layers, weights, row_length_within("sparse", 8192), seed=0, mixed=is_mixed("sparse"))
        signs, row_format = spreaders(spec, self.factors), RowFormat(encoding="sparse", length=spec.row_length, most_bytes=8192)
        for batch in self.batches:
            rows, _ = feature_rows(self.model, self.layers, self.factors, spec, signs, true_label_loss, batch)
            row_format.encode(rows)

    def make_vectors(self) -> None:
        self.vectors = solve(query_gradients(self.attributed, self.asked, self.factors).gradients, self.factors)

    def scan(self) -> None:
        self.scores = scan(self.attributed, self.vectors, self.sequences)

    def rerank(self) -> None:
        score_sequences(self.attributed, {name: vector[0] for name, vector in self.vectors.items()}, self.sequences)


if __name__ == "__main__":
    main()
