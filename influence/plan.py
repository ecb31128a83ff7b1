"""What a run will cost, from the shapes of its model, the size of its data and the rates of a machine: work, memory and disk of every stage.

Arithmetic alone: it loads no weights, reads no data and measures nothing. Letters of shapes are those of `ekfac.record`: a layer's gradient is
[O, J], T is the tokens of a sequence. Products are counted in operations, two for a multiplication and its addition.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from ekfac import BLOCK_NUMBERS, Backend, Coverage, Layer
from indexing import RowFormat, held_bytes
from influence.batches import (
    BatchBudget,
    MemoryUse,
    budget_beside,
    covariance_sizes,
    factor_bytes,
    layer_groups,
    memory_use,
    model_memory,
    queries_at_once,
)
from influence.calibration import Rates
from influence.config import Config
from influence.data_size import DataSize
from influence.run import MOST_SCAN_UNITS, fit_sizes, num_fit_units

# Measured on the runs of benchmarks/plan.py (benchmarks/NOTES.md).

PROCESS_BYTES = 740 * 10**6
"""Interpreter and libraries, once the model's are loaded."""

ACTIVATIONS_OF_WIDTH, COPIES_OF_LOGITS = 1.1, 8
"""What a forward and backward pass holds for a token, beside the widths that `batches` counts and the vocabulary."""

SHARE_KEPT = 0.7
"""Of what a pass has freed, what the process still holds in the stages after it."""

LOGIT_PASSES, DRAWN_LOGIT_PASSES, ACTIVATION_PASSES = 2.6, 4.0, 1.7
"""The loss, the loss with drawn labels, and a layer's surroundings, for each logit and each number into and out of a layer: `Rates.elementwise`."""

EIGENVALUE_BYTES, ROW_BYTES, SCAN_BYTES = 32, 44, 24
"""Memory that is read and written for each number of a sequence's gradient by the three passes that make it."""

SUM_BYTES = 24
"""The same for each number of a float64 sum to which a batch's product is added."""

EIGEN_BYTES = 56
"""Memory for each of the n² numbers of a covariance while its eigenvectors are found."""

DISK_BYTES_PER_SECOND = 5e8
"""With the checksum of what is written."""

START_SECONDS, LOADING_BYTES_PER_SECOND = 9.0, 5e8
"""The interpreter and its libraries; and reading weights, checking them and taking their fingerprint."""

READING_SECONDS_PER_TOKEN = 4e-7
"""Of a stored sequence."""

BYTES_PER_ID, LEXICAL_BYTES_PER_WORD, SKETCH_BYTES = 110, 51, 776
"""Memory for a sequence's id, for a posting while the lexical index is made, and for a row's sketch while the index is measured."""

INDEX_SECONDS, SEARCH_SECONDS = 1.0, 2.5e-7
"""To begin with FAISS, and for a row's sketch, on one core."""

MOST_MAPPED_FILES = 65_530
"""Linux lets a process map so many (vm.max_map_count), and every shard's rows are one."""

RECORD_BYTES, LAYER_BYTES = 360, 260
"""On disk: what tells of a unit's files beside them, with their headers; and a layer in layers.json."""

WORKERS_OF_A_MACHINE = 8
"""So many share a machine's memory, as GPUs do in NVIDIA's DGX."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the arithmetic needs to know of a model."""

    coverage: Coverage
    use: MemoryUse
    bytes_per_number: int
    products_per_token: int
    """Weights that a token is multiplied by, the head among them."""
    attention_width: int
    """Heads × their dimension, summed over the blocks."""
    vocabulary: int
    heads: frozenset[str]
    """Of the attributed embeddings, those that are the model's head."""
    tied: frozenset[str]
    """Of these, those that are looked up too."""

    @property
    def parameter_bytes(self) -> int:
        return self.use.model_bytes


def model_shape(model: nn.Module, coverage: Coverage, quantize: Literal["8bit", "4bit"] | None = None) -> ModelShape:
    """Of a model, which may be one without weights; `quantize` tells in how many bits the base's will be loaded."""
    if isinstance(model, Backend):
        return _shape_of_backend(model, coverage)
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    modules = dict(model.named_modules())
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    multiplied = [p for p in model.parameters() if p.ndim > 1 and (id(p) not in tables or p is head)]
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    head_dimension = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    use = model_memory(model, coverage.layers)
    return ModelShape(
        coverage=coverage,
        use=replace(use, model_bytes=use.model_bytes - saved_bytes(model, quantize)),
        bytes_per_number=next(model.parameters()).element_size(),
        products_per_token=int(sum(p.numel() * (used if p.ndim == 3 else 1) for p in multiplied)),
        attention_width=layers * heads * head_dimension,
        vocabulary=int(getattr(config, "vocab_size", 0)),
        heads=frozenset(
            layer.name
            for layer in coverage.layers
            if layer.kind == "embedding" and any(not isinstance(modules[name], nn.Embedding) for name in layer.modules)
        ),
        tied=frozenset(layer.name for layer in coverage.layers if layer.kind == "embedding" and len(layer.modules) > 1),
    )


def _shape_of_backend(model: Backend, coverage: Coverage) -> ModelShape:
    products, config = model.products(), model.config
    return ModelShape(
        coverage=coverage,
        use=model_memory(model, coverage.layers),
        bytes_per_number=next(model.parameters()).element_size(),
        products_per_token=products.of_token,
        attention_width=products.of_pair // 2,
        vocabulary=int(getattr(config, "vocab_size", 0)),
        heads=products.heads,
        tied=products.tied,
    )


def saved_bytes(model: nn.Module, quantize: Literal["8bit", "4bit"] | None) -> int:
    """What bitsandbytes takes less for the weights of the base's linear layers but for its head, than this model, of which none is quantized.

    In 8 bits a byte for a weight and a scale in float32 for each output; in 4 bits half of a byte, and a scale in float32 for 64 weights (Dettmers et
    al. 2023, arXiv 2305.14314, section 3, without double quantization).
    """
    if quantize is None:
        return 0
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and not m.weight.requires_grad]
    saved = 0
    for weight in (weight for weight in linear if weight is not head):
        size = (
            weight.numel() + 4 * weight.shape[0]
            if quantize == "8bit"
            else math.ceil(weight.numel() / 2) + 4 * math.ceil(weight.numel() / 64)
        )
        saved += weight.numel() * weight.element_size() - size
    return saved


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage does, in the units of `Rates`; merged with `+`."""

    model_products: float = 0
    """In the model's own dtype."""
    products: float = 0
    """In float32: statistics, rotations, gradients."""
    eigen: float = 0
    elementwise: float = 0
    streamed: float = 0
    stored: float = 0
    """Bytes read from disk and written to it."""
    seconds: float = 0
    """Of other work."""

    def __add__(self, other: "Work") -> "Work":
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, times: float) -> "Work":
        return Work(**{name: value * times for name, value in vars(self).items()})

    @property
    def operations(self) -> float:
        """Of products; an eigendecomposition is counted as 9 n³."""
        return self.model_products + self.products + 9 * self.eigen

    def time(self, rates: Rates, half: bool) -> float:
        """Seconds on one worker."""
        return (
            self.model_products / (rates.half_products if half else rates.products)
            + self.products / rates.products
            + self.eigen / rates.eigen
            + self.elementwise / rates.elementwise
            + self.streamed / rates.stream
            + self.stored / DISK_BYTES_PER_SECOND
            + self.seconds
        )


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage will take. Memory is of one worker, at its peak."""

    name: str
    units: int
    memory_bytes: int
    """Of the machine."""
    device_bytes: int
    """Of the GPU; zero where there is none."""
    disk_bytes: int
    operations: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What does not fit, and what would make it fit, the smallest change first."""

    what: str
    changes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's cost before it is spent."""

    coverage: Coverage
    data: DataSize
    rates: Rates
    workers: int
    fitted_on: dict[str, int]
    factor_groups: int
    """In how many groups the layers' factors are held, one after the other."""
    needed_bytes: int
    """What `resources.memory_budget` must be at least."""
    batch_sequences: int
    """In one batch; zero when not even one fits."""
    stages: tuple[StagePlan, ...]
    problems: tuple[Problem, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "problems": [asdict(problem) for problem in self.problems],
            "parameters": {
                "attributed": self.coverage.attributed,
                "total": self.coverage.total,
                "excluded": self.coverage.excluded,
                "whole": self.coverage.whole,
            },
            "layers": len(self.coverage.layers),
            "data": asdict(self.data),
            "rates": asdict(self.rates),
            "workers": self.workers,
            "fitted_on": self.fitted_on,
            "factor_groups": self.factor_groups,
            "needed_bytes": self.needed_bytes,
            "batch_sequences": self.batch_sequences,
            "memory_bytes": max(stage.memory_bytes for stage in self.stages),
            "device_bytes": max(stage.device_bytes for stage in self.stages),
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "stages": {stage.name: {key: value for key, value in asdict(stage).items() if key != "name"} for stage in self.stages},
        }


def plan(config: Config, shape: ModelShape, data: DataSize, rates: Rates, free_disk: int | None) -> Plan:
    """The cost of the configured run. `free_disk`, where it is known, is what the run directory's disk has left."""
    costs = _Costs(config, shape, data, rates)
    stages = costs.stages()
    needed = shape.use.smallest(config.data.sequence_length)
    problems = [
        *_memory_problems(config, shape, rates, needed),
        *(_device_problems(config, stages, rates) if needed <= config.resources.memory_budget else ()),
        *_row_problems(config, shape.coverage),
        *_host_problems(config, stages, data, rates),
        *_disk_problems(config, stages, data, free_disk),
    ]
    return Plan(
        coverage=shape.coverage,
        data=data,
        rates=rates,
        workers=max(1, config.resources.workers),
        fitted_on=costs.fitted_on,
        factor_groups=len(costs.held_at_once),
        needed_bytes=needed,
        batch_sequences=costs.batch if needed <= config.resources.memory_budget else 0,
        stages=tuple(stages),
        problems=tuple(problems),
    )


# work


class _Costs:
    """The costs of a run's stages; what several of them need is computed once."""

    def __init__(self, config: Config, shape: ModelShape, data: DataSize, rates: Rates) -> None:
        self.config, self.shape, self.data, self.rates = config, shape, data, rates
        self.layers, self.tokens = shape.coverage.layers, data.tokens
        wanted = fit_sizes(self.layers, data.counted_tokens, config.factors.sequences)
        self.fitted_on = {stage: min(count, data.sequences) for stage, count in wanted.items()}
        self.shards = max(1, math.ceil(data.sequences / config.data.sequences_per_shard))
        self.groups = num_fit_units(self.fitted_on, self.shards, config.data.sequences_per_shard)
        self.queries = config.index.recall_queries if data.sequences > 1 else 0
        memory_budget = config.resources.memory_budget
        self.held_at_once = layer_groups(shape.use, memory_budget, config.data.sequence_length, rates.kind)
        budget = budget_beside(shape.use, self.held_at_once, memory_budget, rates.kind)
        self.batch = largest_batch(budget, math.ceil(self.tokens), math.ceil(max(self.fitted_on["eigenvalues"] / self.groups, 1)))
        self.numbers = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        self.covariances = covariance_sizes(self.layers)
        self.at_once = max(1, min(self.queries, *(queries_at_once(budget, group) for group in self.held_at_once)))
        index = config.index
        self.row = RowFormat(encoding=index.encoding, length=min(index.row_length, self.numbers), most_bytes=index.bytes_per_sequence)

    def stages(self) -> list[StagePlan]:
        data, groups, shards, scanned = self.data, self.groups, self.shards, min(self.shards, MOST_SCAN_UNITS)
        square = sum(size**2 for size in self.covariances.values())
        sums = {"covariances": 8 * square, "eigenvalues": 8 * self.numbers}
        bases, factors, rows = 4 * square, 4 * self.numbers, data.sequences * (self.row.bytes_per_row + 8)
        scans = 8 * self.queries * data.sequences
        read = Work(seconds=READING_SECONDS_PER_TOKEN * data.sequences * self.tokens)
        asked = self.query_work() + Work(streamed=2 * SCAN_BYTES * self.numbers)
        work: dict[str, tuple[int, float, Work]] = {  # units, bytes on disk, work of all units
            "start": (1, 0, Work(seconds=START_SECONDS + self.shape.parameter_bytes / LOADING_BYTES_PER_SECOND)),
            "sequences": (1, data.sequences * data.stored_bytes, Work(seconds=data.sequences * data.seconds)),
            "lexical": (1, data.sequences * data.lexical_bytes, Work(seconds=data.sequences * data.lexical_seconds)),
            "layers": (1, LAYER_BYTES * len(self.layers), Work(seconds=self.shape.parameter_bytes / LOADING_BYTES_PER_SECOND)),
            "covariances": (
                groups,
                groups * sums["covariances"],
                self.covariance_work() * self.fitted_on["covariances"] + Work(stored=groups * sums["covariances"]) + read,
            ),
            "eigenbases": (
                len(self.covariances),
                bases,
                Work(eigen=sum(size**3 for size in self.covariances.values()), stored=groups * sums["covariances"] + bases),
            ),
            "eigenvalues": (
                groups,
                groups * sums["eigenvalues"],
                self.eigenvalue_work() * self.fitted_on["eigenvalues"] + Work(stored=groups * sums["eigenvalues"]) + read,
            ),
            "factors": (1, factors, Work(stored=groups * sums["eigenvalues"] + factors)),
            "rows": (shards, rows, self.row_work() * data.sequences + Work(stored=rows) + read),
            "scans": (
                scanned if self.queries else 0,
                scans,
                (self.query_work() + self.solve_work()) * (self.queries * scanned) + self.scan_work() * data.sequences + read,
            ),
            "fidelity": (1 if self.queries else 0, 500, asked * self.queries + self.index_work()),
        }
        return [self._stage(name, units, disk, done) for name, (units, disk, done) in work.items() if units]

    def _stage(self, name: str, units: int, disk: float, work: Work) -> StagePlan:
        rounds = math.ceil(units / max(1, self.config.resources.workers))
        on_host, on_device = self.memory(name)
        return StagePlan(
            name=name,
            units=units,
            memory_bytes=int(on_host),
            device_bytes=int(on_device),
            disk_bytes=int(disk) + (RECORD_BYTES * units if disk else 0),
            operations=work.operations,
            seconds=work.time(self.rates, self.shape.bytes_per_number < 4) * rounds / units,
        )

    def capture_work(self, logit_passes: float) -> Work:
        """A forward pass and the backward pass of activations, for one sequence, once for each group of layers."""
        tokens, shape = self.tokens, self.shape
        attention = (4 + 8) * tokens**2 * shape.attention_width
        width = sum(layer.routed * sum(layer.unshared) if layer.kind == "linear" else layer.shape[1] for layer in self.layers)
        once = Work(
            model_products=4 * shape.products_per_token * tokens + attention,
            elementwise=tokens * (ACTIVATION_PASSES * width * shape.bytes_per_number / 4 + logit_passes * shape.vocabulary),
        )
        return once * len(self.held_at_once)

    def covariance_work(self) -> Work:
        """For one sequence: the upper triangles of sums of outer products, in panels of 256 columns, which are added once a batch."""
        twice = {layer.input_name: 2 for layer in self.layers if layer.name in self.shape.tied}
        reached = {name: layer.routed for layer in self.layers for name in (layer.input_name, layer.output_name)}
        triangles = {name: size * (size + 256) / 2 * twice.get(name, 1) for name, size in self.covariances.items()}
        return self.capture_work(DRAWN_LOGIT_PASSES) + Work(
            products=2 * self.tokens * sum(reached[name] * count for name, count in triangles.items()),
            streamed=SUM_BYTES * sum(triangles.values()) / self.batch,
        )

    def eigenvalue_work(self) -> Work:
        streamed = EIGENVALUE_BYTES * self.gradient_numbers() + SUM_BYTES * self.numbers / self.batch
        return self.capture_work(DRAWN_LOGIT_PASSES) + self.rotated() + Work(streamed=streamed)

    def row_work(self) -> Work:
        """As corrected eigenvalues, with spreading in place of squares, and the transform of the row, or the choice of its largest numbers."""
        mixed = self.row.length * (1.5 if self.row.encoding == "sparse" else 1 + math.log2(max(2, self.row.length)) / 4)
        return self.query_work() + Work(streamed=ROW_BYTES * self.gradient_numbers(), elementwise=mixed)

    def query_work(self) -> Work:
        """One measurement's gradient in the eigenbasis."""
        return self.capture_work(LOGIT_PASSES) + self.rotated()

    def solve_work(self) -> Work:
        """(G + λI)⁻¹ of one gradient in the eigenbasis, taken out of it."""
        linear = sum(2 * o * j * (o + j) for layer in self.layers if layer.kind == "linear" for o, j in [layer.shape])
        tables = sum(2 * o * j * j for layer in self.layers if layer.kind == "embedding" for o, j in [layer.shape])
        return Work(products=linear + tables, streamed=SCAN_BYTES * self.numbers)

    def scan_work(self) -> Work:
        """One sequence's plain gradients against all queries, a pass for as many of them as are held at once."""
        passes = math.ceil(self.queries / self.at_once)
        gradient = Work(products=2 * self.tokens * self.gradient_products(), streamed=SCAN_BYTES * self.gradient_numbers())
        return (self.capture_work(LOGIT_PASSES) + gradient) * passes + Work(products=2 * self.queries * self.gradient_numbers())

    def index_work(self) -> Work:
        """Two indexes of all rows are made and searched at both ends; the scores of a sample are estimated from whole rows."""
        count, sample = self.data.sequences, min(10_000, self.data.sequences)
        searched = 4 * self.queries * count * SEARCH_SECONDS
        return Work(
            stored=2 * count * self.row.bytes_per_row,
            seconds=INDEX_SECONDS + searched,
            products=2 * self.queries * sample * self.row.num_kept,
            streamed=10 * sample * self.row.num_kept,
        )

    def rotated(self) -> Work:
        """One sequence's gradient in the eigenbasis; on either side, whether its tokens are rotated or the gradient is decided as in `ekfac.record`.

        Tokens that blocks of a layer share are rotated once.
        """
        products, tokens = 0.0, self.tokens
        of_module: dict[tuple[str, ...], tuple[int, int]] = {}
        for layer in (layer for layer in self.layers if layer.is_block):
            before = of_module.get(layer.modules, (0, 0))
            of_module[layer.modules] = before[0] + layer.shape[0], before[1] + layer.shape[1]
        for layer in self.layers:
            o, j = layer.shape
            if layer.kind == "linear":
                own = layer.routed * tokens
                all_o, all_j = of_module[layer.modules] if layer.is_block else (o, j)
                on_inputs = min(own * o / all_o if layer.rows else own, o) * j**2
                on_outputs = min(own * j / all_j if layer.output_group else own, j) * o**2
                products += own * o * j + on_inputs + on_outputs
            elif layer.kind == "embedding":
                products += tokens * j * (j * (1 + (layer.name in self.shape.tied)) + (o if layer.name in self.shape.heads else 0))
        return Work(products=2 * products)

    def gradient_products(self) -> float:
        """Multiplications a token takes for its share of the gradients."""
        return sum(
            layer.routed * layer.shape[0] * layer.shape[1]
            for layer in self.layers
            if layer.kind == "linear" or layer.name in self.shape.heads
        )

    def gradient_numbers(self) -> float:
        """Numbers of a sequence's gradients that are computed: of a table that is only looked up, the rows that the batch has."""
        rows = self.batch * self.tokens
        return sum(
            (min(o, rows) if layer.kind == "embedding" and layer.name not in self.shape.heads else o) * j
            for layer in self.layers
            for o, j in [layer.shape]
        )

    # memory

    def memory(self, stage: str) -> tuple[float, float]:
        """Bytes of the machine's memory and of the GPU's that one worker holds at the peak of a stage."""
        on_gpu = self.rates.kind == "cuda"
        square = max(sum(size**2 for size in covariance_sizes(group).values()) for group in self.held_at_once)
        numbers = max(sum(layer.shape[0] * layer.shape[1] for layer in group) for group in self.held_at_once)
        widest, count = max(self.covariances.values(), default=0), self.data.sequences
        model, most = self.shape.parameter_bytes, max(layer.shape[0] * layer.shape[1] for layer in self.layers)
        tokens = max(1, self.batch) * self.tokens
        width = (self.shape.use.bytes_per_token / 4 - 4 * self.shape.vocabulary) / 2
        captured = 4 * tokens * (ACTIVATIONS_OF_WIDTH * width + COPIES_OF_LOGITS * self.shape.vocabulary)
        gradients = (
            4 * 3 * min(max(1, self.batch) * most, max((16 if on_gpu else 1) * BLOCK_NUMBERS, self._rotated_whole() * max(1, self.batch)))
        )
        vectors, ids = 4 * square, BYTES_PER_ID * count
        made = captured + gradients
        factors = vectors + 12 * numbers  # and, for every weight, its eigenvalue, its inverse and its weight in rows
        asked = 4 * self.at_once * numbers
        held = {
            "covariances": captured + 8 * square,
            "eigenbases": SHARE_KEPT * captured + EIGEN_BYTES * widest**2,
            "eigenvalues": made + vectors + 8 * numbers,
            "factors": SHARE_KEPT * made + vectors,
            "rows": made + factors,
            "scans": made + factors + asked,
            "fidelity": made + factors + asked,
        }
        beside = {  # what is the machine's even where there is a GPU
            "sequences": BYTES_PER_ID * count,
            "lexical": LEXICAL_BYTES_PER_WORD * count * self.data.words,
            "covariances": ids,
            "eigenbases": 0,
            "eigenvalues": ids,
            "factors": (12 if self.groups == 1 else 28) * most,
            "rows": ids + 24 * most + 8 * self.row.length * min(self.batch, self.config.data.sequences_per_shard, count),
            "scans": ids,
            "fidelity": ids + (max(SKETCH_BYTES, held_bytes(self.row, count)) + 16 * self.queries) * count,
        }
        read = {"covariances": 8 * square, "eigenbases": 16 * widest**2, "eigenvalues": 8 * numbers}.get(stage, 0)
        process = PROCESS_BYTES + beside.get(stage, 0)
        if stage in ("sequences", "lexical"):
            return process, 0
        if not on_gpu:
            return process + model + held.get(stage, 0), 0
        on_host = process + read + (model if stage in ("start", "layers") else 0)
        return on_host, 0 if stage in ("start", "factors") else model + held.get(stage, 0)

    def _rotated_whole(self) -> int:
        """The numbers of the largest layer whose gradients are whole because they, not its tokens, are rotated on the side of the outputs."""
        linear = (layer.shape for layer in self.layers if layer.kind == "linear")
        return max((outputs * inputs for outputs, inputs in linear if self.tokens >= inputs), default=0)


def largest_batch(budget: BatchBudget, tokens: int, sequences: int) -> int:
    """How many sequences of so many tokens, of those there are, make a batch: one at least."""
    by_tokens = budget.max_tokens // tokens
    by_memory = budget.memory_bytes // (tokens * budget.bytes_per_token + budget.bytes_per_sequence)
    return max(1, min(by_tokens, by_memory, sequences))


# what does not fit


def _memory_problems(config: Config, shape: ModelShape, rates: Rates, needed: int) -> list[Problem]:
    """The budget must hold a worker's model, factors and one sequence, and the device must hold the budget."""
    budget = config.resources.memory_budget
    device = _memory_of_a_worker(config, rates)
    of = f"{rates.device} has {size_text(device)}" + (" for each worker" if device != rates.memory_bytes else "") if device else ""
    if needed <= budget:
        if device is None or budget <= device:
            return []
        lower = f"lower resources.memory_budget to {size_text(device)}: --memory-budget {device // 2**20}MiB"
        if needed <= device:
            return [Problem(what=f"resources.memory_budget is {size_text(budget)}, but {of}", changes=(lower,))]
    changes = []
    if device is None or needed <= device:
        changes.append(f"raise resources.memory_budget: --memory-budget {-(-needed // 2**20)}MiB")
    limit = budget if device is None else max(budget, device) if needed > device else budget
    changes += _smaller(config, shape, limit, budget)
    if device is not None and needed > device and rates.kind == "cuda" and rates.memory_bytes:
        gpus = math.ceil(1.1 * needed / rates.memory_bytes)  # layers are placed whole, and do not fill each of them
        changes.append(f"place the layers over more GPUs: --gpus-per-worker {gpus} --memory-budget {gpus * rates.memory_bytes // 2**20}MiB")
    elif shape.parameter_bytes > limit:
        changes.append(f"none for the model itself, of {size_text(shape.parameter_bytes)}: a worker holds all of it")
    held = f"the model, the factors of its largest layer and one sequence need {size_text(needed)} in a worker"
    what = f"{held}; resources.memory_budget is {size_text(budget)}"
    return [Problem(what=what + (f", and {of}" if device is not None and needed > device else ""), changes=tuple(changes))]


def _memory_of_a_worker(config: Config, rates: Rates) -> int | None:
    """Its part of the machine's, or that of its GPUs."""
    if rates.memory_bytes is None:
        return None
    if rates.kind == "cpu":
        return rates.memory_bytes // max(1, config.resources.workers)
    return rates.memory_bytes * max(1, int(config.resources.gpus_per_worker or 1))


def _device_problems(config: Config, stages: Sequence[StagePlan], rates: Rates) -> Iterator[Problem]:
    """Stages that hold more on a GPU than the budget counts: gradients of queries, and what an eigendecomposition works with."""
    for stage in stages:
        memory = _memory_of_a_worker(config, rates)
        if rates.kind == "cuda" and memory is not None and stage.device_bytes > memory:
            what = f"{stage.name} needs {size_text(stage.device_bytes)} of GPU memory, and a worker has {size_text(memory)}"
            change = (
                "ask no sample queries: --recall-queries 0" if stage.name in ("scans", "fidelity") else "leave layers out: --layers GLOB"
            )
            yield Problem(what=what, changes=(change, "lower resources.memory_budget, on which batches and queries depend"))


def _smaller(config: Config, shape: ModelShape, limit: int, budget: int) -> list[str]:
    """The changes of dtype and of layers after which a worker needs no more than `limit`."""
    halves = {"half": shape.parameter_bytes // 2} if shape.bytes_per_number > 2 else {}
    found = []
    for name, parameters in {"same": shape.parameter_bytes, **halves}.items():
        beginning = "model.dtype bfloat16 (--dtype bfloat16)" if name == "half" else ""
        use = memory_use(shape.coverage.layers, parameters, shape.vocabulary)
        if use.smallest(config.data.sequence_length) <= limit:
            found.append(_with_budget(beginning, use.smallest(config.data.sequence_length), budget))
            continue
        kept = _families_within(shape, parameters, config.data.sequence_length, limit)
        if kept:
            globs, share, needs = kept
            asked = f"attribute {share:.1%} of the parameters: " + " ".join(f"--layers '{glob}'" for glob in globs)
            found.append(_with_budget(f"{beginning}, and {asked}" if beginning else asked, needs, budget))
    return found


def _with_budget(change: str, needs: int, budget: int) -> str:
    return change + (f" --memory-budget {-(-needs // 2**20)}MiB" if needs > budget else "")


MOST_FAMILIES = 12


def _families_within(shape: ModelShape, parameter_bytes: int, length: int, limit: int) -> tuple[list[str], float, int] | None:
    """Globs of the families of layers, alike but for the numbers in their names, that keep most parameters within the limit; their share and need."""
    families: dict[str, list[Layer]] = {}
    for layer in shape.coverage.layers:
        families.setdefault(
            re.sub(r"\.\d+\.|(?<=\.head)\d+", lambda found: ".*." if found[0].startswith(".") else "*", layer.name), []
        ).append(layer)
    ranked = sorted(families.items(), key=lambda item: -sum(layer.shape[0] * layer.shape[1] for layer in item[1]))
    optional, small = ranked[:MOST_FAMILIES], ranked[MOST_FAMILIES:]
    sizes = {glob: sum(layer.shape[0] * layer.shape[1] for layer in members) for glob, members in ranked}
    alone = {glob: _family_use(members) for glob, members in ranked}
    best: tuple[int, list[str], int] | None = None
    for count in range(len(optional), 0, -1):
        for chosen in itertools.combinations(optional, count):
            globs = [glob for glob, _ in (*chosen, *small)]
            needs = _needs(globs, alone, parameter_bytes, shape.vocabulary, length)
            kept = sum(sizes[glob] for glob in globs)
            if needs <= limit and (best is None or kept > best[0]):
                best = kept, globs, needs
    return None if best is None else (best[1], best[0] / shape.coverage.total, best[2])


def _family_use(members: Sequence[Layer]) -> MemoryUse:
    """The memory of these layers alone, in which the largest stands for all: only it is held at a time."""
    return replace(memory_use(members, 0, 0), layers=(max(members, key=lambda layer: factor_bytes([layer])),))


def _largest_factors(use: MemoryUse) -> int:
    return factor_bytes(use.layers)


def _needs(globs: Sequence[str], alone: Mapping[str, MemoryUse], parameter_bytes: int, vocabulary: int, length: int) -> int:
    """What `memory_use` of these families together comes to."""
    return replace(
        max((alone[glob] for glob in globs), key=_largest_factors),
        model_bytes=parameter_bytes,
        bytes_per_token=16 * vocabulary + sum(alone[glob].bytes_per_token for glob in globs),
        bytes_per_sequence=max(alone[glob].bytes_per_sequence for glob in globs),
    ).smallest(length)


def _row_problems(config: Config, coverage: Coverage) -> list[Problem]:
    index, layers = config.index, len(coverage.layers)
    if index.row_length >= layers:
        return []
    bytes_needed = next(size for size in itertools.count(1) if index.model_copy(update={"bytes_per_sequence": size}).row_length >= layers)
    return [
        Problem(
            what=f"rows of {index.bytes_per_sequence} bytes are {index.row_length} numbers in {index.encoding}, fewer than the {layers} layers",
            changes=(f"raise index.bytes_per_sequence: --bytes-per-sequence {bytes_needed}",),
        )
    ]


def _host_problems(config: Config, stages: Sequence[StagePlan], data: DataSize, rates: Rates) -> list[Problem]:
    """Stages that hold something of every sequence in the machine's memory, and files that are open at once."""
    found = []
    for stage in stages:
        beside = min(max(1, config.resources.workers), stage.units, WORKERS_OF_A_MACHINE)
        if rates.host_bytes is None or stage.memory_bytes * beside <= rates.host_bytes:
            continue
        who = "one process" if beside == 1 else f"each of {beside} workers"
        what = f"{stage.name} needs {size_text(stage.memory_bytes)} of memory in {who}; the machine has {size_text(rates.host_bytes)}"
        found.append(Problem(what=what, changes=tuple(_for_host(stage, beside, data.sequences, rates.host_bytes))))
    shards = next(stage.units for stage in stages if stage.name == "rows")
    if shards > MOST_MAPPED_FILES:
        enough = -(-data.sequences // MOST_MAPPED_FILES)
        found.append(
            Problem(
                what=f"the index would be {shards:,} files, and a process may map {MOST_MAPPED_FILES:,}",
                changes=(f"raise data.sequences_per_shard: --sequences-per-shard {enough}",),
            )
        )
    return found


def _for_host(stage: StagePlan, beside: int, sequences: int, host_bytes: int) -> Iterator[str]:
    if stage.name in ("sequences", "lexical", "fidelity"):  # what grows with the number of sequences
        yield f"several runs of at most {sequences * host_bytes // stage.memory_bytes:,} sequences each"
    elif stage.memory_bytes <= host_bytes:
        yield f"no more than {host_bytes // stage.memory_bytes} workers on a machine"


def _disk_problems(config: Config, stages: Sequence[StagePlan], data: DataSize, free: int | None) -> list[Problem]:
    total = sum(stage.disk_bytes for stage in stages)
    if free is None or total <= free:
        return []
    spare = free - sum(stage.disk_bytes for stage in stages if stage.name != "rows")
    per_sequence = spare // max(1, data.sequences) - 8
    changes = [f"lower index.bytes_per_sequence: --bytes-per-sequence {per_sequence}"] if per_sequence >= 256 else []
    what = f"the run directory will hold {size_text(total)}; there are {size_text(free)} free at {config.run.dir}"
    return [Problem(what=what, changes=(*changes, "a run directory on another disk: --out DIR"))]


def size_text(size: float | None) -> str:
    """Bytes for people, in the units of the configuration."""
    value = float(size or 0)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:,.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError
