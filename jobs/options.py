"""Options of the command line that several commands share, and every configuration key as an option.

The latter are made from the configuration's own models, so that the two cannot differ.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from influence.config import Config, parse_bytes
from influence.errors import RequestError
from influence.refinement import RefineOptions
from influence.run import Run, open_run

RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="run directory, or s3://bucket/run or gs://bucket/run")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output and nothing else there")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Prompt = Annotated[str | None, typer.Argument(help="what came before the completion", show_default=False)]
Completion = Annotated[str | None, typer.Argument(help="what the model said", show_default=False)]
Exact = Annotated[bool, typer.Option("--exact", help="scan all sequences instead of the index's candidates")]
Refine = Annotated[
    bool, typer.Option("--refine", help="solve with the exact Gauss-Newton Hessian by conjugate gradients, EK-FAC being the preconditioner")
]
RefineSteps = Annotated[int, typer.Option("--refine-steps", help="at most so many conjugate-gradient steps")]
RefineSequences = Annotated[int, typer.Option("--refine-sequences", help="over how many training sequences the exact Hessian is averaged")]
AlsoRuns = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="RUN", help="average the scores with this run of another checkpoint or training; may be repeated"),
]
Where = Annotated[
    str | None, typer.Option("--where", help="only sequences whose metadata fulfil this, such as \"source = 'web' and year < 2023\"")
]
_QUERIES = typer.Option("--queries", help="jsonl file of queries: id and prompt, completion; or text; or messages; or input_ids")
Queries = Annotated[Path | None, _QUERIES]
RequiredQueries = Annotated[Path, _QUERIES]
AsOne = Annotated[
    str | None, typer.Option("--as-one", metavar="mean|sum", help="ask the queries of --queries as one; a line may have a weight")
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="instead of a query: the mean log-probability of a token of a data set; may be repeated"),
]
DirectionFile = Annotated[
    Path | None,
    typer.Option("--direction", help="safetensors file with a vector under a module's name: explain its activation on the completion"),
]
Reduce = Annotated[
    str | None, typer.Option("--reduce", metavar="mean|last|max", help="of the activation over the completion's tokens (mean)")
]
ByOutputToken = Annotated[
    bool, typer.Option("--by-output-token", help="split scores over the tokens that were to be predicted, not those that were read")
]
Normalize = Annotated[bool, typer.Option("--normalize", help="divide each score by √self-influence of its sequence (RelatIF)")]
ModelOption = Annotated[str | None, typer.Option("--model", help="where the model is now, if it moved; its weights must be the same")]
Server = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="ask this service, which knows RUN by its name; its token is INFLUENCE_TOKEN"),
]
Memory = Annotated[str, typer.Option("--memory-budget", help="memory for model, factors and batches")]


def open_within(run: str, model: str | None, memory_budget: str) -> Run:
    """The run at `run`, to work within that memory. Raises RequestError when it is no run, or that no size."""
    budget = parse_bytes(memory_budget)  # what is not a size comes back as it is
    if not isinstance(budget, int) or budget <= 0:
        raise RequestError(f"--memory-budget: {memory_budget!r} is not a size such as 4GiB")
    return open_run(run, model=model, memory_budget=budget)


def refinement(wanted: bool, steps: int, sequences: int) -> RefineOptions | None:
    """How the answer is refined, if it is. Raises RequestError for details of a refinement that is not wanted."""
    chosen = RefineOptions(steps=steps, sequences=sequences)
    if not wanted and chosen != RefineOptions():
        raise RequestError("--refine-steps and --refine-sequences go with --refine")
    return chosen if wanted else None


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each of its parameters that is a dataclass taken apart: the fields are options, and the command gets the object of them."""
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, one in parameters.items() if name not in groups]
    taken_apart = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for group in groups.values()
        for field in fields(group)
    ]

    def wrapped(**given: Any) -> None:
        made = {name: group(**{field.name: given.pop(field.name) for field in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    return _with_signature(wrapped, command, [*own, *taken_apart])


def _with_signature(wrapped: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """`wrapped`, which looks like the command, but for its parameters."""
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


# What people type for the keys they need most.
_SHORT = {"model.name": "--model", "data.files": "--data", "run.dir": "--out"}


def config_options() -> dict[str, tuple[str, str]]:
    """For each "section.key": its option and what it means. A key that several sections have is preceded by its section."""
    sections: dict[str, type[BaseModel]] = {name: _model(field.annotation) for name, field in Config.model_fields.items()}
    count = Counter(key for section in sections.values() for key in section.model_fields)
    options = {}
    for section, model in sections.items():
        for key, field in model.model_fields.items():
            name = f"{section}.{key}"
            flag = _SHORT.get(name) or "--" + (key if count[key] == 1 else f"{section}-{key}").replace("_", "-")
            options[name] = (flag, f"{name}: {field.description or ''}")
    return options


def _model(annotation: Any) -> type[BaseModel]:
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command(…, overrides)` as a command with one option per configuration key; `overrides` gets those that were given."""
    options = config_options()
    lists = {f"{section}.{key}" for section, field in Config.model_fields.items() for key in _list_keys(_model(field.annotation))}
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "overrides"]
    extra = [
        inspect.Parameter(
            name.replace(".", "__"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                list[str] | None if name in lists else str | None,
                typer.Option(flag, help=meaning, rich_help_panel="Configuration (the same keys as in the file)"),
            ],
        )
        for name, (flag, meaning) in options.items()
    ]

    def wrapped(**given: Any) -> None:
        overrides = {name: value for name in options if (value := given.pop(name.replace(".", "__"), None)) not in (None, [])}
        command(**given, overrides=overrides)

    return _with_signature(wrapped, command, [*own, *extra])


def _list_keys(model: type[BaseModel]) -> list[str]:
    return [key for key, field in model.model_fields.items() if field.annotation == list[str]]
