"""The documents keep up with the code: what one names, the other has."""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from influence.service import ServiceSettings, create_app
from influence.service.bodies import QueryBody
from jobs.cli import app
from jobs.options import config_options

ROOT = Path(__file__).parent.parent


def normalized(name: str) -> str:
    """A distribution's name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_dependencies() -> set[str]:
    """Names in pyproject.toml: required ones and those of every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normalized(re.match(r"[\w.-]+", requirement)[0]) for requirements in lists for requirement in requirements}


def documented_dependencies() -> set[str]:
    """Names in the first column of the tables in docs/dependencies.md; an extra in brackets is not part of a name."""
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    return {normalized(name) for row in rows for name in re.findall(r"`([\w.-]+)", row)}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {normalized(name): version for name, _, version in (line.partition("==") for line in lines)}


NOT_DECLARED = {"kronfluence", "curvlinops-for-pytorch", "boto3"}  # docs/dependencies.md says why


def test_docs_explain_every_dependency_and_no_other() -> None:
    assert documented_dependencies() == declared_dependencies() | NOT_DECLARED


def test_constraints_pin_every_dependency_to_one_version_for_cpu_and_gpu_alike() -> None:
    versions = pins()
    assert declared_dependencies() | NOT_DECLARED <= versions.keys()
    assert [name for name, version in versions.items() if not re.fullmatch(r"[\w.]+", version)] == [], "name==version, no local version"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_constraints_leave_out_what_breaks_transformers_beside_a_cpu_build_of_torch(name: str) -> None:
    assert name not in pins()


def reference() -> str:
    return (ROOT / "docs/reference.md").read_text(encoding="utf-8")


def command_options() -> list[tuple[str, str]]:
    """(command, option) for all that the command line knows."""
    group = typer.main.get_command(app)
    inner = {name: getattr(command, "commands", {"": command}) for name, command in group.commands.items()}
    return [
        (name, flag)
        for name, commands in inner.items()
        for command in commands.values()
        for parameter in command.params
        for flag in [*parameter.opts, *parameter.secondary_opts]
        if flag.startswith("-") and flag != "--help"
    ]


def test_every_command_is_documented() -> None:
    commands = {name for name, _ in command_options()}
    assert commands == set(re.findall(r"^### `influence (\w+)", reference(), re.M))


def test_every_option_is_documented() -> None:
    assert [pair for pair in command_options() if not re.search(rf"`{re.escape(pair[1])}[` ]", reference())] == []


def test_every_configuration_key_is_documented_with_its_option_and_no_other() -> None:
    documented = re.findall(r"^\| `(\w+\.\w+)` \| `([\w-]+)` \|", reference(), re.M)
    assert dict(documented) == {key: flag for key, (flag, _) in config_options().items()}


def test_every_route_is_documented_and_no_other(tmp_path: Path) -> None:
    """The page is files, not a route of OpenAPI."""
    documented = set(re.findall(r"^\| `([A-Z]+) (/[^`]*)` \|", reference(), re.M)) - {("GET", "/")}
    service = create_app(ServiceSettings(state_dir=tmp_path))
    service.state.service.store.close()
    assert documented == {(method.upper(), path) for path, methods in service.openapi()["paths"].items() for method in methods}


def test_every_field_of_a_query_over_http_is_documented() -> None:
    section = reference().partition("## HTTP")[2].partition("\n## ")[0]
    assert [name for name in QueryBody.model_fields if f"`{name}`" not in section] == []
