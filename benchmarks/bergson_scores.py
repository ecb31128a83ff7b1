"""Bergson's EK-FAC scores of a folder's queries, for `influence evaluate RUN lds --scores bergson=FILE.npy`, and its seconds.

    python benchmarks/bergson_scores.py FOLDER --out FILE.npy [--refine]

FOLDER is laid out as for `lds.py`: `final/`, a GPT-2 model, and `train.jsonl` and `query.jsonl`, whose `input_ids` are all of one length. FILE gets
the scores [Q, N], float32, positive where training on the sequence lowers the query's loss. Attributed are the four linear layers of each block with
their biases; the loss is summed over the predicted tokens; factors come from labels drawn from the model, in float32, damped by 0.1 times the mean
eigenvalue of the layer.

With `--refine` the EK-FAC solution x of each query q is refined by Bergson's `astra` with `solver="cg"`: preconditioned conjugate gradients on
(H + D) x = q, one query at a time, for a fixed number of steps without a tolerance. H is the exact Gauss-Newton matrix of the summed loss, a mean
over `--hessian-sequences` training sequences that are drawn anew for each query; D is the damping of each layer; the preconditioner is the damped
EK-FAC inverse. The solver does not say what it reached: this script computes the relative residual |q - (H + D) x| / |q| of its first and last x,
over the sequences that it used, in the plain norm and in the preconditioner's, outside the measured seconds.

Run it in an environment of Bergson's own. It calls the workers behind Bergson 2.5.1's commands, not the commands: these refuse batches of more tokens
than the model has positions, which here would be one sequence at a time. Each step's seconds include its loading of the model; "scores" is the pass
over the training sequences.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

# Bergson asks for these two and does not use them; transformers imports those it finds, and the registry's builds do not load beside a CPU build of
# torch, which would break every import of a model.
sys.modules.update({"torchvision": None, "torchaudio": None})  # type: ignore[dict-item]

# ruff: noqa: E402
import numpy as np
import torch
from bergson.build import build_worker
from bergson.config import AstraConfig, HessianConfig, IndexConfig, InversionConfig, PreprocessConfig, ScoreConfig
from bergson.config.config import DataConfig
from bergson.data import create_index, load_gradients, load_scores
from bergson.hessians.apply_hessian import EkfacApplicator, EkfacConfig
from bergson.hessians.astra import Astra, AstraPaths
from bergson.hessians.hessian_approximations import hessian_worker
from bergson.score.score import score_worker
from datasets import Dataset
from torch import Tensor

ALONE = (0, 0, 1)  # rank, local rank, number of processes
INVERSION = InversionConfig(inversion="damped_inverse", damping_factor=0.1)  # 1 / (eigenvalue + 0.1 × their mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--queries", type=int, help="how many of query.jsonl, from its start; 25 by default, 10 with --refine")
    parser.add_argument("--sequences", type=int, help="how many of train.jsonl, from its start; all by default")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens at a time (Bergson's own default)")
    parser.add_argument("--refine", action="store_true", help="refine the EK-FAC solutions by conjugate gradients")
    parser.add_argument("--steps", type=int, default=10, help="of the conjugate gradients, for each query")
    parser.add_argument("--hessian-sequences", type=int, default=128, help="in each product with the Gauss-Newton matrix")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    train = read_tokens(options.folder / "train.jsonl", options.sequences)
    queries = read_tokens(options.folder / "query.jsonl", options.queries or (10 if options.refine else 25))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        steps = Steps(Path(name), options.folder.resolve() / "final", options.batch_tokens)
        hessian = steps.fit(train)
        gradients = steps.query_gradients(queries)
        solved = steps.precondition(gradients, hessian)
        residuals: tuple[tuple[Residual, Residual], ...] = ()
        if options.refine:
            cg = AstraConfig(num_steps=options.steps, solver="cg", batch_size=options.hessian_sequences)
            solved, residuals = steps.refine(gradients, solved, hessian, train, cg)
        scores = steps.scores(solved, train)
    assert scores.shape == (len(queries), len(train)), scores.shape
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(options.out, scores)
    print(f"\nBergson {version('bergson')}, {torch.get_num_threads()} threads: {len(queries)} queries, {len(train)} sequences")
    print(", ".join(f"{step} {seconds:.1f} s" for step, seconds in steps.seconds.items()))
    if options.refine:
        print(f"{steps.seconds['conjugate gradients'] / len(queries):.1f} s a query; relative residuals, plain (preconditioned):")
        for row, (first, last) in enumerate(residuals):
            print(f"query {row}: {first} from EK-FAC, {last} after {options.steps} steps")


def read_tokens(path: Path, count: int | None) -> Dataset:
    """The first `count` sequences of a file. `ValueError` unless all have one length, as in the scripts it is compared with."""
    rows = [json.loads(line)["input_ids"] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"{path} has sequences of {sorted(lengths)} tokens; cut them to one length")
    return Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


class Steps:
    """Bergson's steps, each writing to a folder of its own, whose path it returns; and the seconds they took."""

    def __init__(self, folder: Path, model: Path, batch_tokens: int) -> None:
        self.folder = folder
        # loss_reduction "sum": what training on a sequence of a given length minimizes, up to a factor that is the same for all
        self.config = IndexConfig(
            run_path="", model=str(model), precision="fp32", include_bias=True, loss_reduction="sum", token_batch_size=batch_tokens
        )
        self.seconds: dict[str, float] = {}

    def fit(self, train: Dataset) -> Path:
        """EK-FAC factors: covariances, eigendecomposition, corrected eigenvalues."""
        config = self.config_of("hessian")
        with self.timed("fitting"):
            hessian_worker(*ALONE, config, HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=False), train)
        return config.partial_run_path

    def query_gradients(self, queries: Dataset) -> Path:
        config = self.config_of("queries")
        with self.timed("query gradients"):
            build_worker(*ALONE, config, PreprocessConfig(), queries)
        return config.partial_run_path

    def precondition(self, gradients: Path, hessian: Path) -> Path:
        out = self.folder / "preconditioned"
        config = EkfacConfig(hessian_method_path=str(hessian), gradient_path=str(gradients), run_path=str(out), ev_correction=True)
        with self.timed("EK-FAC inverse"):
            EkfacApplicator(config, inversion_cfg=INVERSION).compute_ivhp_sharded()
        return out

    def refine(
        self, gradients: Path, start: Path, hessian: Path, train: Dataset, astra: AstraConfig
    ) -> tuple[Path, tuple[tuple["Residual", "Residual"], ...]]:
        """Conjugate gradients from `start`, and each query's relative residual before and after them."""
        out, data = self.folder / "refined", self.folder / "train"
        train.save_to_disk(data)  # Astra reads its data itself
        from_start = load_gradients(start)
        create_index(out, len(from_start), json.loads((start / "info.json").read_text())["grad_sizes"], from_start.dtype)
        shutil.copy(start / "processor_config.yaml", out)
        paths = AstraPaths(query_path=str(gradients), init_path=str(start), hessian_path=str(hessian), run_path=str(out))
        # It collects its own batches, and like the commands refuses batches of more tokens than the model has positions.
        config = replace(self.config, data=DataConfig(dataset=str(data)), token_batch_size=len(train[0]["input_ids"]))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        solver = MeasuredAstra(paths, config, INVERSION, astra, ev_correction=True, device=device)
        solver.run(range(len(from_start)))
        self.seconds["conjugate gradients"] = solver.seconds
        return out, solver.residuals

    def scores(self, solved: Path, train: Dataset) -> np.ndarray:
        """[Q, N]: the inner product of each query's solution with each training sequence's gradient."""
        config = self.config_of("scores")
        with self.timed("scores"):
            score_worker(*ALONE, config, ScoreConfig(query_path=str(solved), precision="fp32"), PreprocessConfig(), train)
        found = load_scores(config.partial_run_path)
        assert found.is_written()
        return np.ascontiguousarray(found[:].T, dtype=np.float32)

    def config_of(self, step: str) -> IndexConfig:
        """The configuration of a step whose worker expects its folder, `partial_run_path`, to exist."""
        config = replace(self.config, run_path=str(self.folder / step))
        config.partial_run_path.mkdir()
        return config

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


class MeasuredAstra(Astra):
    """Bergson's solver, with the seconds of its conjugate gradients and the residuals that they started from and reached."""

    seconds = 0.0
    residuals: tuple[tuple["Residual", "Residual"], ...] = ()

    def _cg(self, q: dict[str, Tensor], x: dict[str, Tensor], row: int, indices: list[int]) -> dict[str, Tensor]:
        # A copy, because on a CPU x is a read-only map of a file, and writing there, as the solver does, ends the process.
        x = {name: value.clone() for name, value in x.items()}
        first = self.residual(q, x, indices)
        start = time.perf_counter()
        x = super()._cg(q, x, row, indices)
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.residuals += ((first, self.residual(q, x, indices)),)
        return x

    def residual(self, q: dict[str, Tensor], x: dict[str, Tensor], indices: list[int]) -> "Residual":
        product = self._damped_product(x, indices)
        rest = {name: q[name] - product[name] for name in self.names}
        preconditioned = self._dot(rest, self._precondition(rest)) / self._dot(q, self._precondition(q))
        return Residual(plain=(self._dot(rest, rest) / self._dot(q, q)) ** 0.5, preconditioned=preconditioned**0.5)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """|r| / |q| with r = q - (H + D) x: in the plain norm, and in that of the preconditioner M, |r|² = r'Mr, in which the solver works."""

    plain: float
    preconditioned: float

    def __str__(self) -> str:
        return f"{self.plain:.4g} ({self.preconditioned:.4g})"


if __name__ == "__main__":
    main()
