"""`influence plan`: what a run will cost before it is spent."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence.batches import covariance_sizes
from influence.calibration import Rates, measure, rates_of
from influence.config import Config, load_config
from influence.data_size import DataSize, assumed, resized, sampled
from influence.errors import RequestError
from influence.model import find_layers, load_tokenizer, longest_sequence, model_without_weights
from influence.plan import ModelShape, Plan, model_shape, size_text
from influence.plan import plan as planned
from jobs.options import Debug, Json


def plan_of(config: Config, device: str | None, sequences: int | None, tokens: float | None) -> Plan:
    """The plan of the configured run: on this machine, which is measured, or on a device of the table.

    Raises RequestError for a run that could not be made at any cost, and when there is nothing to tell the size of the data by.
    """
    rates = None if device is None else rates_of(device)
    model = model_without_weights(config.model)
    limit = longest_sequence(model)
    if limit is not None and config.data.sequence_length > limit:
        raise RequestError(f"data.sequence_length is {config.data.sequence_length}, but the model has {limit} positions: lower it")
    if tokens is not None and tokens > config.data.sequence_length:
        raise RequestError(f"--tokens-per-sequence is {tokens:g}, more than data.sequence_length, {config.data.sequence_length}")
    layers = find_layers(model, config.factors.patterns, config.factors.split_layers)
    shape = model_shape(model, layers, config.model.quantize)
    data = _data_size(config, sequences, tokens)
    free = None if device is not None else _free_disk(Path(config.run.dir))
    return planned(config, shape, data, rates or _measured(shape, config), free)


def _data_size(config: Config, sequences: int | None, tokens: float | None) -> DataSize:
    """From the data's files where they and the tokenizer are there, else from what was given."""
    try:
        tokenizer = load_tokenizer(config.model)
        if len(tokenizer) < 2:  # transformers makes an empty one where there is nothing but config.json
            raise RequestError(f"no tokenizer can be loaded from {config.model.name!r}: its files are missing")
        found = sampled(config.data, tokenizer)
    except RequestError as error:
        if sequences is None:
            raise RequestError(f"how large the data is cannot be told: {error}; --training-sequences says how many there will be") from None
        return assumed(sequences, tokens or float(config.data.sequence_length), f"no data read: {error}")
    return resized(found, sequences, tokens) if sequences or tokens else found


def _measured(shape: ModelShape, config: Config) -> Rates:
    """This machine's rates for products as the model's largest share of them is, and eigendecompositions as most of their time is spent on."""
    linear = [layer for layer in shape.coverage.layers if layer.kind == "linear"]
    typical = max(linear or shape.coverage.layers, key=lambda layer: layer.inputs * layer.outputs)
    sizes = covariance_sizes(shape.coverage.layers).values()
    return measure((typical.inputs, typical.outputs), max(sizes, default=256), config.model.dtype)


def _free_disk(run: Path) -> int:
    existing = next(path for path in (run, *run.parents) if path.exists())
    return shutil.disk_usage(existing).free


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration; options given beside it win", show_default=False)] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="plan for h200, h100, a100, l40s, l4 or cpu (one core); left out, this machine is measured"),
    ] = None,
    training_sequences: Annotated[
        int | None, typer.Option("--training-sequences", min=1, help="how many training sequences there will be, instead of counting them")
    ] = None,
    tokens_per_sequence: Annotated[
        float | None,
        typer.Option("--tokens-per-sequence", min=2, help="tokens of a training sequence, on average, instead of counting them"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """What a run will cost before it is spent: memory, disk and time of each stage, and what does not fit. Loads no weights."""
    made = plan_of(load_config(config, overrides), device, training_sequences, tokens_per_sequence)
    if as_json:
        print(json.dumps(made.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        _print_plan(made)


def _print_plan(made: Plan) -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.width = max(console.width, 100)
    coverage, data, rates = made.coverage, made.data, made.rates
    console.print(
        f"model: {coverage.total:,} parameters, {coverage.share:.1%} of them attributed, in {len(coverage.layers)} layers"
        f"{_with_reasons('not attributed', coverage.excluded)}{_with_reasons('not split', coverage.whole)}"
    )
    console.print(f"data: {data.sequences:,} sequences of {data.tokens:,.0f} tokens ({data.basis})")
    console.print(
        f"fit on {made.fitted_on['covariances']:,} sequences (covariances) and {made.fitted_on['eigenvalues']:,} (eigenvalues); "
        f"batches of {made.batch_sequences} sequences; factors of {_groups(made.factor_groups)}"
    )
    console.print(f"{made.workers} {'worker' if made.workers == 1 else 'workers'}, each: {_rates(rates)}")
    on_gpu = rates.kind == "cuda"
    table = Table("stage", "units", "memory", *(["GPU memory"] if on_gpu else []), "disk", "products", "time")
    for stage in made.stages:
        gpu = [size_text(stage.device_bytes) if stage.device_bytes else ""] if on_gpu else []
        table.add_row(
            stage.name,
            f"{stage.units:,}",
            size_text(stage.memory_bytes),
            *gpu,
            size_text(stage.disk_bytes),
            f"{stage.operations:.1e}" if stage.operations else "",
            duration(stage.seconds),
        )
    console.print(table)
    console.print(f"altogether: {size_text(made.disk_bytes)} on disk, {duration(made.seconds)}")
    for problem in made.problems:
        console.print(Text(f"does not fit: {problem.what}"))
        for change in problem.changes:
            console.print(Text(f"  {change}"))
    if made.fits:
        console.print(f"fits: a worker needs a memory budget of {size_text(made.needed_bytes)} at least")
    else:
        console.print("this run does not fit as it is configured")


def _with_reasons(what: str, modules: dict[str, str]) -> str:
    if not modules:
        return ""
    reasons: dict[str, list[str]] = {}
    for name, reason in modules.items():
        reasons.setdefault(reason, []).append(name)
    some = (f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}" for reason, names in reasons.items())
    return f"; {what}: " + "; ".join(some)


def _groups(count: int) -> str:
    return "all layers at once" if count == 1 else f"{count} groups of layers, one after the other"


def _rates(rates: Rates) -> str:
    return (
        f"{rates.device}, {rates.products / 1e9:,.3g} billion operations a second in float32, {rates.half_products / 1e9:,.3g} in the model's dtype, "
        f"{rates.stream / 1e9:,.3g} GB a second"
    )


def duration(seconds: float) -> str:
    """Seconds for people."""
    for length, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
