"""Every configuration key as a command-line option, made from the configuration's own models, so that the two cannot differ."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from influence.config import Config

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

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *extra]}
    return wrapped


def _list_keys(model: type[BaseModel]) -> list[str]:
    return [key for key, field in model.model_fields.items() if field.annotation == list[str]]
