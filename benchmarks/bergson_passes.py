r"""The seconds of each pass of Bergson's EK-FAC, also as multiples of F (`passes.py`), each at its best batch size, and its memory.

    python benchmarks/bergson_passes.py FOLDER --json FILE.json [--queries 256] [--batch-sizes 8 16 32 64] [--repeats 3] [--scores FILE.npy]

in an environment of its own:

    pip install torch==2.13.0 numpy transformers==5.23.0 accelerate datasets peft torchopt jaxtyping ml_dtypes natsort petname scipy \
        simple-parsing bitsandbytes && pip install --no-deps bergson==2.5.1

(its dependencies would bring torchvision and torchaudio, which it does not use and whose registry builds do not load beside the CPU build of torch).
Attributed are the four linear layers of each block with their biases; all is float32, eigendecompositions float64; labels are drawn from the
model; damping is 0.1 times the mean eigenvalue.

It calls the functions behind Bergson's commands, which load the model for each pass and keep the gradients of queries in files. What makes it fast
without changing its scores: `InMemoryCollector`, which preconditions the queries as it collects them (the command for it takes two at a time),
and `InMemorySequenceScoreWriter`; no `save_uncorrected_eigenvalues`; one scan for all queries; the attention that is fastest for F. Batch
sizes are `token_batch_size` over the length of a sequence. Covariances, eigenvectors and corrected eigenvalues are written to files all the same,
within the seconds.
"""

import logging
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Bergson asks for these two and does not use them; transformers imports those it finds, and the registry's builds do not load beside a CPU build of
# torch, which would break every import of a model.
sys.modules.update({"torchvision": None, "torchaudio": None})  # type: ignore[dict-item]
os.environ["TQDM_DISABLE"] = "1"

# ruff: noqa: E402
import numpy as np
import torch
from bergson import CollectorComputer, InMemoryCollector
from bergson.config import HessianConfig, IndexConfig, InversionConfig, PreprocessConfig
from bergson.data import allocate_batches
from bergson.hessians.eigenvectors import eigendecompose_owned
from bergson.hessians.hessian_approximations import collect_hessians
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.score.scorer import Scorer
from bergson.utils.worker_utils import processor_for, setup_model_and_peft
from datasets import Dataset
from peer_passes import Setting, Stage, default_device, fastest, one_part, options, plain_stage, read_tokens, report
from torch import Tensor

HESSIAN = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=False)


def main() -> None:
    opts = options(__doc__.split("\n")[0])
    logging.disable(logging.INFO)
    train, queries = read_tokens(opts.folder, opts.queries)
    plain = plain_stage(opts.folder, train)
    chosen = fastest(plain, passes=2)  # everything is divided by it
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        passes = Passes(Path(folder), opts.folder.resolve() / "model", str(chosen["F"]["attention"]), train, queries)
        report(f"Bergson {version('bergson')}", [plain, *passes.stages(opts.batch_sizes)], chosen, opts, len(train))
    if opts.scores:
        np.save(opts.scores, passes.scores.T.contiguous().numpy())


class Passes:
    """Bergson's passes over a model, each keeping what the next ones need."""

    def __init__(self, folder: Path, model: Path, attention: str, train: Tensor, queries: Tensor) -> None:
        self.config = IndexConfig(
            run_path=str(folder / "hessian"),
            model=str(model),
            model_kwargs=f"attn_implementation={attention}",
            precision="fp32",
            include_bias=True,
            loss_reduction="sum",
        )
        self.folder = self.config.partial_run_path  # where Bergson's functions write and read
        self.folder.mkdir()
        self.model, _ = setup_model_and_peft(self.config)
        self.train, self.queries = train, queries

    def stages(self, batch_sizes: list[int]) -> list[Stage]:
        sizes = [{"batch_size": size} for size in batch_sizes]
        return [
            one_part("covariances", sizes, self.fit_covariances),
            one_part("eigendecompositions", [{}], lambda *_: self.decompose()),
            one_part("eigenvalues", sizes, self.fit_eigenvalues),
            one_part("queries", sizes, lambda setting, _: self.precondition_queries(setting)),
            one_part("scan", sizes, self.scan),
        ]

    def fit_covariances(self, setting: Setting, count: int) -> None:
        data = dataset(self.train[:count])
        self.collector = collect_hessians(
            self.model, data, self.config, batches=batches(data, setting), hessian_cfg=HESSIAN, path=str(self.folder)
        )

    def decompose(self) -> None:
        found = self.collector
        self.bases = tuple(
            eigendecompose_owned(covariances, shapes, None, 1, str(self.folder / name), found.dtype, num_positions=found.num_positions)[0]
            for covariances, shapes, name in (
                (found.A_cov_dict, found.A_shapes, "eigen_activation_sharded"),
                (found.S_cov_dict, found.S_shapes, "eigen_gradient_sharded"),
            )
        )
        del self.collector

    def fit_eigenvalues(self, setting: Setting, count: int) -> None:
        data = dataset(self.train[:count])
        collect_hessians(
            self.model,
            data,
            self.config,
            batches=batches(data, setting),
            hessian_cfg=HESSIAN,
            path=str(self.folder),
            ev_correction=True,
            num_documents=count,
            eigenvectors=dict_copies(self.bases),
        )

    def precondition_queries(self, setting: Setting) -> None:
        inversion = InversionConfig(inversion="damped_inverse", damping_factor=0.1)  # 1 / (eigenvalue + 0.1 × their mean)
        preprocess = PreprocessConfig(hessian_path=str(self.folder), ev_correction=True, inversion_cfg=inversion)
        self.preconditioned: dict[str, Tensor] = {}  # the last ones, before their successors
        self.preconditioned = self.collect(dataset(self.queries), setting, preprocess_cfg=preprocess).gradients

    def scan(self, setting: Setting, count: int) -> None:
        """Sets `scores` [count, Q]."""
        writer = InMemorySequenceScoreWriter(count, len(self.queries))
        scorer = Scorer(self.preconditioned, list(self.preconditioned), writer, default_device(), torch.float32)
        self.collect(dataset(self.train[:count]), setting, scorer=scorer)
        self.scores = writer.scores

    def collect(self, data: Dataset, setting: Setting, **settings: object) -> InMemoryCollector:
        collector = InMemoryCollector(
            model=self.model.base_model, data=data, cfg=self.config, processor=processor_for(self.config), **settings
        )
        CollectorComputer(self.model, data, collector=collector, batches=batches(data, setting), cfg=self.config).run_with_collector_hooks()
        return collector


def dict_copies(bases: tuple[dict[str, Tensor], ...]) -> tuple[dict[str, Tensor], ...]:
    """Dictionaries that may be emptied, as Bergson does when it is done; the tensors are shared."""
    return tuple(dict(vectors) for vectors in bases)


def dataset(tokens: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist(), "length": [tokens.shape[1]] * len(tokens)})


def batches(data: Dataset, setting: Setting) -> list[list[int]]:
    return allocate_batches(data["length"][:], data["length"][0] * int(setting["batch_size"]))


if __name__ == "__main__":
    main()
